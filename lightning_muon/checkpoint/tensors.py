"""Tensors apart from everything else: what a sharded checkpoint cuts into pieces, and what it keeps as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["check_tensors", "flatten", "join", "nest", "separate"]

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
                f"{'.'.join(where)!r} is a {type(value).__name__}; the sharded part of a checkpoint holds tensors. Put"
                " the rest into meta; lightning_muon.checkpoint.tensors.separate does."
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


def separate(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nested dictionaries, once with the tensors and once with everything else.

    Only dictionaries with text for keys are looked into; a list goes with the rest as it is.
    """
    tensors: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            tensors[key] = value
        elif isinstance(value, Mapping) and value and all(isinstance(inner, str) for inner in value):
            inner_tensors, inner_rest = separate(value)
            if inner_tensors:
                tensors[key] = inner_tensors
            if inner_rest or not inner_tensors:
                rest[key] = inner_rest
        else:
            rest[key] = value
    return tensors, rest


def join(tensors: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """What ``separate`` took apart."""
    joined = dict(rest)
    for key, value in tensors.items():
        joined[key] = join(value, rest.get(key, {})) if isinstance(value, Mapping) else value
    return joined
