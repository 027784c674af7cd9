"""What the monitors share: when they are due, and one collection and one log call for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.monitoring import Collection, Request, collect
from lightning_muon.monitoring.collect import Mode
from lightning_muon.muon import Muon
from lightning_muon.names import canonical_name

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["Monitor"]


class Monitor(Callback):
    """Base of the monitors.

    All monitors of a trainer that are due at the same step are served by the first of them: one sum over the
    processes per optimizer, one ``log_metrics`` per logger. Names are those of the parameters in the LightningModule.
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

    def default_interval(self, trainer: pl.Trainer) -> int:
        """Steps between two measurements where the user said nothing."""
        return max(1, int(getattr(trainer, "log_every_n_steps", 50)))

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
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        monitors = [c for c in trainer.callbacks if isinstance(c, Monitor)]  # type: ignore[attr-defined]
        if monitors[0] is not self or trainer.global_step == self._last_step:
            return  # another one serves, or the optimizer did not step (accumulation)
        self._last_step = trainer.global_step
        due = [
            monitor
            for monitor in monitors
            if trainer.global_step % (monitor.every_n_steps or monitor.default_interval(trainer)) == 0
        ]
        if not due:
            return
        names: dict[Tensor, str] = {param: canonical_name(name) for name, param in pl_module.named_parameters()}
        collection = collect(_muons(trainer), [monitor.request for monitor in due], names)
        for logger in trainer.loggers:
            logger.log_metrics(collection.values, step=trainer.global_step)
        if trainer.is_global_zero:
            for monitor in due:
                monitor.show(trainer, collection)

    def show(self, trainer: pl.Trainer, collection: Collection) -> None:
        """Log what is no scalar; on process 0."""


def _muons(trainer: pl.Trainer) -> list[Muon]:
    optimizers: list[Optimizer] = trainer.optimizers
    return [optimizer for optimizer in optimizers if isinstance(optimizer, Muon)]
