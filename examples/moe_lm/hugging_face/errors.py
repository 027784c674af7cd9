"""What is wrong with a folder, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["ConversionError", "some"]

_MOST_NAMED = 8


class ConversionError(ValueError):
    """A folder or a checkpoint cannot be converted. Nothing has been written."""


def some(names: Sequence[str]) -> str:
    """The first few of many."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
