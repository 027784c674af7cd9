"""Nested dictionaries of tensors: what a sharded checkpoint cuts into pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["check_tensors", "flatten", "nest"]

Path = tuple[str, ...]


def flatten(state: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor of nested dictionaries, with the keys that lead to it.

    Raises:
        TypeError: A key is no text, or a value neither a tensor nor a dictionary: ``torch.distributed.checkpoint``
            would pickle those, read number keys back as places in a list, and run code when it loads them.
    """
    for key, value in state.items():
        where = (*path, key)
        if not isinstance(key, str):
            raise TypeError(f"The key {key!r} in {'.'.join(map(str, path))!r} must be text; use parameter names.")
        if isinstance(value, Tensor):
            yield where, value
        elif isinstance(value, Mapping):
            yield from flatten(value, where)
        else:
            raise TypeError(
                f"{'.'.join(where)!r} is a {type(value).__name__}; the sharded part of a checkpoint holds tensors only."
                " Save one file (save_distributed_checkpoint=False), or keep it out of the module's state."
            )


def check_tensors(state: Mapping[str, Any]) -> None:
    """Raise what ``flatten`` would."""
    for _ in flatten(state):
        pass


def nest(values: Mapping[Path, Any]) -> dict[str, Any]:
    """The nested dictionaries that ``flatten`` took apart."""
    nested: dict[str, Any] = {}
    for path, value in values.items():
        inner = nested
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
    return nested
