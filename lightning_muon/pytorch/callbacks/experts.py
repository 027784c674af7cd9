"""The monitor of a mixture of experts: how even the load of its experts is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_muon.arguments import Mode, check_interval, check_mode, check_pattern
from lightning_muon.experts import ExpertLoads, Read
from lightning_muon.fabric.loggers import Loggers

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["ExpertLoadMonitor"]


class ExpertLoadMonitor(Callback):
    """How evenly the routers use the experts, layer by layer, over all processes; with any optimizer.

    | key | meaning | range |
    |---|---|---|
    | `moe/max_vio/<layer>` | `(max - mean)/mean` of the tokens per expert | 0 … E - 1 |
    | `moe/min_load/<layer>` | `min/mean` of the tokens per expert | 0 … 1 |
    | `moe/load_entropy/<layer>` | `-Σ f ln f / ln E` of the load fractions f | 0 … 1 |
    | `moe/dead_experts/<layer>` | share of experts without a token | 0 … 1 |
    | `moe/router_entropy/<layer>` | mean over the tokens of `-Σ p ln p / ln E`, p the normalised scores | 0 … 1 |
    | `moe/routing_confidence/<layer>` | mean over the tokens of `Σ p` over the chosen experts | 0 … 1 |
    | `moe/load/<layer>.<expert>` | load fraction f, with ``mode="detailed"`` | 0 … 1 |
    | `muon/alarms/dead_experts` | experts that have had no token in twenty measurements, over 500 steps | 0 … |

    Counted are the tokens of all micro-batches of one optimizer step, in training mode, every ``log_every_n_steps``
    steps; what a backward pass computes again (activation checkpointing) is not counted twice. Aggregates over the
    layers: ``_min``, ``_mean``, ``_max``. Cost: a `scatter_add` of the choices and a few passes over the scores, at the
    steps that are logged; one sum over the processes and one copy to the host.

    The first training step is looked at whatever the interval, so that a router that cannot be read is known at once.
    An expert that has had no token in twenty measurements in a row, over 500 steps at least, is warned of, once.

    Args:
        every_n_steps: Optimizer steps between two measurements; ``None`` takes ``log_every_n_steps``.
        include: Regular expression that a layer's name must match somewhere; ``None`` takes all. The layer is the
            module that holds the router.
        exclude: Regular expression that it must not match.
        mode: ``"brief"``, or ``"detailed"`` for the load of every expert.
        read: How to read what a router returns; see ``lightning_muon.ExpertLoads``.
        routers: Which modules are routers; see there.

    Raises:
        ValueError: An argument out of its range.
        MisconfigurationException: When training starts: there is no router, or no logger.
        TypeError: In the first training step: what a router returns is not understood.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        include: str | None = None,
        exclude: str | None = None,
        mode: Mode = "brief",
        read: Read | None = None,
        routers: str | None = None,
    ) -> None:
        check_interval(every_n_steps)
        check_mode(mode)
        for argument, value in (("include", include), ("exclude", exclude), ("routers", routers)):
            check_pattern(argument, value)
        self.every_n_steps = every_n_steps
        self._options: dict[str, Any] = {
            "include": include,
            "exclude": exclude,
            "mode": mode,
            "read": read,
            "routers": routers,
        }
        self._loads: ExpertLoads | None = None
        self._loggers = Loggers()
        self._last_step = 0

    @property
    def loads(self) -> ExpertLoads:
        """What counts, during ``fit``."""
        if self._loads is None:
            raise RuntimeError("ExpertLoadMonitor counts during Trainer.fit only.")
        return self._loads

    def is_due(self, trainer: pl.Trainer, step: int) -> bool:
        """Whether to log the loads of this optimizer step, counted from 1."""
        interval = self.every_n_steps or int(getattr(trainer, "log_every_n_steps", 50))
        return interval > 0 and step % interval == 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.loggers:
            raise MisconfigurationException(
                "ExpertLoadMonitor needs a logger; this Trainer has none (logger=False). Give it one, or leave the"
                " callback out."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._loggers = Loggers()
        # after configure_model, which may make the layers, and before anything is compiled by running it
        try:
            self._loads = ExpertLoads(pl_module, **self._options)
        except ValueError as error:
            raise MisconfigurationException(f"ExpertLoadMonitor: {error}") from error

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step
        self.loads.start()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # where the batch ends, every optimizer may have stepped
        steps = range(trainer.global_step + 1, trainer.global_step + 1 + len(trainer.optimizers))
        if not self.loads.is_counting and any(self.is_due(trainer, step) for step in steps):
            self.loads.start()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._last_step:
            return  # the optimizer did not step (accumulation)
        self._last_step = trainer.global_step
        if not self.loads.is_counting:
            return
        if not self.is_due(trainer, trainer.global_step):
            self.loads.stop()
            return
        values = self.loads.collect(trainer.global_step)
        self._loggers.log(trainer, values)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._loads is not None:
            self._loads.close()
            self._loads = None
