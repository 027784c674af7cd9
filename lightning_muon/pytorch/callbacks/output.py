"""What the monitors have found, on its way to the loggers of process 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import TensorBoardLogger

from lightning_muon.fabric.loggers import Loggers
from lightning_muon.monitoring import Collection
from lightning_muon.pytorch.callbacks.pictures import LayerPictures

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import Logger

__all__ = ["Output", "Show"]

Show = Callable[["Logger", Collection], None]


class Output:
    """The loggers of one training, and the pictures that TensorBoard gets."""

    def __init__(self) -> None:
        self._pictures = LayerPictures()
        self._loggers = Loggers()

    def log(self, trainer: pl.Trainer, collection: Collection, show: Sequence[Show]) -> None:
        """Log one measurement.

        Args:
            trainer: The Trainer.
            collection: What was found.
            show: Logs what is no scalar, once for each logger.
        """
        step = trainer.global_step
        for number, logger in enumerate(trainer.loggers):
            self._loggers.attempt(f"{type(logger).__name__} {number}", step, _log_to, logger, step, collection, show)
        self._loggers.attempt("The heat maps", step, self._draw, trainer, step, collection)

    def finish(self, trainer: pl.Trainer) -> None:
        """Draw the last pictures."""
        step = trainer.global_step
        self._loggers.attempt("The heat maps", step, self._finish, trainer, step)

    def _finish(self, trainer: pl.Trainer, step: int) -> None:
        self._pictures.finish(_writers(trainer), step)

    def _draw(self, trainer: pl.Trainer, step: int, collection: Collection) -> None:
        if writers := _writers(trainer):
            self._pictures.add(step, collection.values)
            self._pictures.draw(writers, step)


def _log_to(logger: Logger, step: int, collection: Collection, show: Sequence[Show]) -> None:
    logger.log_metrics(collection.values, step=step)
    for one in show:
        one(logger, collection)


def _writers(trainer: pl.Trainer) -> list[Any]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
