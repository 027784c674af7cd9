"""Loggers that may fail: what goes wrong on process 0 must not end it, for the others would wait for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities import rank_zero_warn

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["Loggers"]


class Loggers:
    """Logs, and says once of each logger that it could not."""

    def __init__(self) -> None:
        self._failed: set[str] = set()

    def log(self, trainer: pl.Trainer, values: Mapping[str, float]) -> None:
        """Give the values to every logger, at the Trainer's step.

        Args:
            trainer: The Trainer.
            values: By key.
        """
        for number, logger in enumerate(trainer.loggers):
            step = trainer.global_step
            self.attempt(f"{type(logger).__name__} {number}", step, logger.log_metrics, dict(values), step)

    def attempt(self, who: str, step: int, log: Callable[..., object], *arguments: Any) -> None:
        """Call ``log``; an error is a warning, the first time.

        Args:
            who: What is to be said to have failed.
            step: The optimizer step.
            log: What may fail.
            arguments: Its arguments.
        """
        try:
            log(*arguments)
        except Exception as error:
            if who not in self._failed:
                self._failed.add(who)
                rank_zero_warn(
                    f"{who} could not log what the monitors found at step {step}: {type(error).__name__}: {error}."
                    " Training goes on, and the monitors go on trying; this is said once."
                )
