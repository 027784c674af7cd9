"""What the monitors share: when they are due, and one collection and one log call for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.monitoring import Collection, Mode, Request, collect
from lightning_muon.muon import Muon
from lightning_muon.names import canonical_name

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["Monitor", "parameter_names"]


class Monitor(Callback):
    """Base of the monitors.

    All monitors of a trainer that are due at the same step are served by the first of them: one look at the momentum
    on its way through the step, one sum over the processes per optimizer, one ``log_metrics`` per logger. Names are
    those of the parameters in the LightningModule.
    Where a sharded strategy clips by norm, the norm before clipping is logged as well: ``muon/grad_norm``, and of
    either algorithm's parameters ``muon/grad_norm_muon``, ``muon/grad_norm_adamw``.

    Args:
        every_n_steps: Optimizer steps between two measurements; ``None`` takes the monitor's default.
        include: Regular expression that a parameter's name must match somewhere; ``None`` takes all.
        exclude: Regular expression that it must not match.
        mode: ``"brief"`` or ``"detailed"``: for a parameter of several matrices (a stack of experts), its own value
            with ``.min`` and ``.max``, or every matrix ``.0``, ``.1``, … as well.
    """

    families: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        every_n_steps: int | None = None,
        include: str | None = None,
        exclude: str | None = None,
        mode: Mode = "brief",
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be 1 or more.")
        self.every_n_steps = every_n_steps
        self.request = Request(self.families, include, exclude, mode)
        self._last_step = 0
        self._warned: set[str] = set()

    def default_interval(self, trainer: pl.Trainer) -> int:
        """Steps between two measurements where the user said nothing."""
        return max(1, int(getattr(trainer, "log_every_n_steps", 50)))

    def is_due(self, trainer: pl.Trainer, step: int) -> bool:
        """Whether to measure what this optimizer step, counted from 1, leaves behind."""
        return step % (self.every_n_steps or self.default_interval(trainer)) == 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.loggers:
            raise MisconfigurationException(
                f"{type(self).__name__} needs a logger; this Trainer has none (logger=False). Give it one, or leave"
                " the callback out."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _muons(trainer):
            raise MisconfigurationException(
                f"{type(self).__name__} watches lightning_muon.Muon; this Trainer's optimizers are"
                f" {[type(optimizer).__name__ for optimizer in trainer.optimizers]}."
            )
        self._last_step = trainer.global_step

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        monitors = _monitors(trainer)
        if monitors[0] is not self or not isinstance(optimizer, Muon):
            return
        # where the batch ends, every other optimizer may have stepped as well
        steps = range(trainer.global_step + 1, trainer.global_step + 1 + len(trainer.optimizers))
        due = [monitor.request for monitor in monitors if any(monitor.is_due(trainer, step) for step in steps)]
        if any(request.is_watching for request in due):
            names = parameter_names(pl_module)
            optimizer.watch_next_step({key for request in due for key in request.spectra_of(optimizer, names)})

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        monitors = _monitors(trainer)
        if monitors[0] is not self or trainer.global_step == self._last_step:
            return  # another one serves, or the optimizer did not step (accumulation)
        self._last_step = trainer.global_step
        due = [monitor for monitor in monitors if monitor.is_due(trainer, trainer.global_step)]
        if not due:
            return
        collection = collect(_muons(trainer), [monitor.request for monitor in due], parameter_names(pl_module))
        self._warn(collection)
        for logger in trainer.loggers:
            logger.log_metrics(collection.values, step=trainer.global_step)
        if trainer.is_global_zero:
            for monitor in due:
                monitor.show(trainer, collection)

    def _warn(self, collection: Collection) -> None:
        """Newton–Schulz has left its range; once for each parameter."""
        for name, (residual, promise) in collection.broken_promises.items():
            if name not in self._warned:
                self._warned.add(name)
                rank_zero_warn(
                    f"{name}: before the last step of Newton–Schulz the residual ‖XXᵀ-I‖_F/√rank is {residual:.4g}, and"
                    f" its polynomial sequence allows {promise:.4g} at most: rounding has carried singular values out"
                    " of the range that it is made for, and the update is not to be trusted. Give Muon"
                    " orthogonalization_dtype=torch.float32, or a sequence with more head-room, such as"
                    " orthogonalization={'name': 'polar_express', 'steps': 5, 'lower': 1e-3, 'safety': 1.05}."
                    " This is said once for each parameter; muon/ns_residual has every value."
                )

    def show(self, trainer: pl.Trainer, collection: Collection) -> None:
        """Log what is no scalar; on process 0."""


def _monitors(trainer: pl.Trainer) -> list[Monitor]:
    return [c for c in trainer.callbacks if isinstance(c, Monitor)]  # type: ignore[attr-defined]


def parameter_names(pl_module: pl.LightningModule) -> dict[Tensor, str]:
    """What the logs call each parameter."""
    return {param: canonical_name(name) for name, param in pl_module.named_parameters()}


def _muons(trainer: pl.Trainer) -> list[Muon]:
    optimizers: list[Optimizer] = trainer.optimizers
    return [optimizer for optimizer in optimizers if isinstance(optimizer, Muon)]
