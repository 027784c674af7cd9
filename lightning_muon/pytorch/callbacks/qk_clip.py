"""QK-Clip as a callback of the Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_muon.arguments import check_interval, check_mode, check_pattern
from lightning_muon.attention import DescribeHeads, QKClipper
from lightning_muon.attention.report import ALARM
from lightning_muon.fabric.loggers import Loggers
from lightning_muon.monitoring import Mode
from lightning_muon.monitoring.alarms import Alarms

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["QKClip"]


class QKClip(Callback):
    """Keeps attention's logits from exploding, as Kimi K2 does (arXiv 2507.20534), and logs the largest.

    A head's ``S`` is its largest logit ``q·k·scale`` over all training forwards since the last optimizer step,
    micro-batches included, on all processes. After each step of the optimizer, a head with ``S > tau`` has the rows
    that make its queries and keys scaled, so that its logits become ``tau/S`` of what they were: both by the root, and
    where a key is shared by several heads (grouped queries, the rotated key of latent attention) the query alone.
    All else stays as it is, bit for bit.

    | key | meaning |
    |---|---|
    | `attention/max_logit/<module>` | S of the module's largest head, at the step that is logged |
    | `attention/max_logit/<module>.<head>` | S of each head (``mode="detailed"``) |
    | `attention/max_logit/_max`, `_mean`, `_min` | over the modules |
    | `attention/clipped_heads/<module>` | heads that were clipped since the last time it was logged |
    | `muon/alarms/attention_logits` | modules in trouble |

    An alarm is a head above ``2·tau``, or above ``tau`` with ``log_only``, or not finite: said once, and again only
    after it was over.

    With any strategy and any optimizer whose parameters are the model's. It costs the products of queries and keys
    once more, in float32, in every step; with ``log_only``, in the steps that are logged.

    Args:
        tau: τ, the largest logit that is left alone; ``float("inf")`` leaves all alone.
        log_only: Change nothing, and look at the steps that are logged only.
        every_n_steps: Optimizer steps between two logged ones; ``None`` takes the Trainer's ``log_every_n_steps``.
        include: Regular expression that the name of an attention module must match somewhere; ``None`` takes all.
        exclude: Regular expression that it must not match.
        mode: ``"brief"`` or ``"detailed"``.
        heads: Describes attention modules that are not found by the names of their projections: a mapping from names
            in the LightningModule to ``AttentionHeads``, or a function of name and module.

    Raises:
        ValueError: An argument is out of range. When training starts: no attention in the model, its heads are not
            known, or clipping it would do nothing.
        RuntimeError: After the first forward: attention is computed where it cannot be seen.
    """

    def __init__(
        self,
        tau: float = 100.0,
        log_only: bool = False,
        every_n_steps: int | None = None,
        include: str | None = None,
        exclude: str | None = None,
        mode: Mode = "brief",
        heads: DescribeHeads | None = None,
    ) -> None:
        if not isinstance(tau, int | float) or not tau > 0:
            raise ValueError(f"tau={tau!r} must be a positive number.")
        check_pattern("include", include)
        check_pattern("exclude", exclude)
        check_interval(every_n_steps)
        check_mode(mode)
        self.tau, self.log_only, self.every_n_steps = tau, log_only, every_n_steps
        self.include, self.exclude, self.mode, self.heads = include, exclude, mode, heads
        self._clipper: QKClipper | None = None
        self._optimizers: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []
        self._alarms, self._loggers = Alarms(), Loggers()
        self._last_step = self._first_step = 0
        self._steps_of_a_batch = 1

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self.log_only and not trainer.loggers:
            raise MisconfigurationException(
                "QKClip(log_only=True) needs a logger; this Trainer has none (logger=False). Give it one, or leave the"
                " callback out."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()
        clipper = QKClipper(
            pl_module,
            self.tau,
            log_only=self.log_only,
            include=self.include,
            exclude=self.exclude,
            heads=self.heads,
        )
        self._alarms, self._loggers = Alarms(), Loggers()
        self._clipper, self._last_step, self._first_step = clipper, trainer.global_step, trainer.global_step
        # what manual optimization does in a batch is known after one
        self._steps_of_a_batch = 1 if pl_module.automatic_optimization else max(1, self._interval(trainer))
        self._optimizers = [one for one in trainer.optimizers if clipper.is_trained_by(one)]
        if self.log_only:
            self._optimizers = self._optimizers or trainer.optimizers[:1]
        elif missing := clipper.untrained(trainer.optimizers):
            raise MisconfigurationException(
                f"QKClip: no optimizer trains {', '.join(missing[:3])}. Leave it out by exclude=, or only watch, with"
                " log_only=True."
            )
        self._handles = [one.register_step_post_hook(self._after_step) for one in self._optimizers]

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._clipper is not None and self.log_only:
            # the first step too: what cannot be seen is said at once
            self._clipper.watch(self._may_log(trainer) or trainer.global_step == self._first_step)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        # before the step, which may leave weights on their way, and which waits for the device anyhow
        if self._clipper is None or not any(optimizer is one for one in self._optimizers):
            return
        if self._clipper.is_watching:
            self._clipper.reduce()
            for text in self._alarms.hear(self._clipper.findings()):
                rank_zero_warn(text)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """A step that a gradient scaler leaves out does not come here: its maxima stay for the next."""
        if self._clipper is not None and self._clipper.is_reduced:
            self._clipper.clip(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._clipper is None or trainer.global_step == self._last_step:
            return  # accumulation
        self._steps_of_a_batch = trainer.global_step - self._last_step
        self._last_step = trainer.global_step
        interval = self._interval(trainer)
        if trainer.loggers and interval > 0 and trainer.global_step % interval == 0:
            values = self._clipper.figures(self.mode)
            values[f"muon/alarms/{ALARM}"] = float(self._alarms.standing().get(ALARM, 0))
            self._loggers.log(trainer, values)

    def _interval(self, trainer: pl.Trainer) -> int:
        """Steps between two that are logged; 0 is never."""
        return self.every_n_steps or int(getattr(trainer, "log_every_n_steps", 50))

    def _may_log(self, trainer: pl.Trainer) -> bool:
        """Whether what the batch leaves behind is logged, if it steps as often as the one before."""
        first, interval = trainer.global_step + 1, self._interval(trainer)
        return interval > 0 and any(step % interval == 0 for step in range(first, first + self._steps_of_a_batch))

    def _close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._clipper is not None:
            self._clipper.close()
            self._clipper = None

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()
