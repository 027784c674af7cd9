"""One verdict for all processes: if one fails, all raise, and nobody waits for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_muon.checkpoint.errors import CheckpointError

__all__ = ["Processes"]

T = TypeVar("T")
_KINDS: tuple[type[Exception], ...] = (CheckpointError, OSError, TypeError, ValueError, KeyError, RuntimeError)


@dataclass(frozen=True)
class Processes:
    """Those that save or load one checkpoint.

    Attributes:
        group: Their process group; ``None`` is the default one.
        rank: The number of this process among them.
        size: How many they are; 1 without ``torch.distributed``.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Processes:
        """The members of a group, or this process alone where there is no process group."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(None, 0, 1)
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def together(self, function: Callable[[], T]) -> list[T]:
        """Call ``function`` on every process, and bring what each returned to all: one collective.

        Returns:
            The results, by rank.

        Raises:
            Exception: What it raised on this process, or else on the first one where it did.
        """
        result: T | None = None
        error: Exception | None = None
        try:
            result = function()
        except Exception as raised:
            error = raised
        everyone: list[Any] = [(result, _portable(error))]
        if self.size > 1:
            everyone *= self.size
            dist.all_gather_object(everyone, (result, _portable(error)), group=self.group)
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(everyone):
            if failure is not None:
                number, text = failure
                raise _KINDS[number](f"{text} (found by process {rank})")
        return [value for value, _ in everyone]

    def on_first(self, function: Callable[[], T]) -> None:
        """Call ``function`` on process 0 only; all wait for it, and raise if it raises."""
        self.together(lambda: function() if self.rank == 0 else None)


def _portable(error: Exception | None) -> tuple[int, str] | None:
    """Only the kind of an error and its text cross processes: the rest may be anything."""
    if error is None:
        return None
    number = next((n for n, kind in enumerate(_KINDS) if isinstance(error, kind)), len(_KINDS) - 1)
    return number, str(error)
