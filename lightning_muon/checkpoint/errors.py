"""What is wrong with a checkpoint, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["CheckpointError", "some", "unusable"]

_MOST_NAMED = 5


class CheckpointError(ValueError):
    """A checkpoint is missing, torn, altered, unsafe, or of something else. Nothing has been loaded from it."""


def unusable(path: Path, what: str, advice: str = "") -> CheckpointError:
    """The error that names a checkpoint, what is wrong with it, and what to do.

    Args:
        path: The checkpoint.
        what: What is wrong, as a sentence.
        advice: What to do; by default, to resume from an earlier checkpoint of the same folder, which are named.
    """
    return CheckpointError(f"{path}: {what} {advice or _earlier(path)}")


def some(names: Sequence[str]) -> str:
    """The first few of many."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _earlier(path: Path) -> str:
    others = [other for other in _entries(path.parent) if other.name != path.name and _looks_like_one(other, path)]
    others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
    if not others:
        return "There is no other checkpoint beside it."
    return f"Resume from another one: beside it there is {some([other.name for other in others])} (newest first)."


def _entries(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.exists()] if folder.is_dir() else []


def _looks_like_one(other: Path, path: Path) -> bool:
    if other.name.startswith("."):
        return False
    return (other / ".metadata").is_file() or (other.is_file() and other.suffix == (path.suffix or ".ckpt"))
