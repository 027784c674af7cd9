"""Layers as the rows of a picture: those of a type together, by depth, and no more than fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lightning_muon.logs.layers import Layer, layers

__all__ = ["Row", "arrange", "short_types", "spread"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        name: Of the parameter or module.
        type: Its layer type, short.
        label: What stands beside the row: the type and the block at the first row of a type, the block at the others.
    """

    name: str
    type: str
    label: str


def arrange(names: Iterable[str], max_rows: int) -> list[Row]:
    """Order layers by type, and by depth within it.

    Args:
        names: In any order; types come in the order of their first names.
        max_rows: Of more layers, blocks spread over the depth are taken, of every type as many.

    Returns:
        The rows from top to bottom.
    """
    layer_of = layers(names)
    types = short_types(layer_of.values())
    by_type: dict[str, list[str]] = defaultdict(list)
    for name, layer in layer_of.items():
        by_type[layer.type].append(name)
    ordered = [sorted(group, key=lambda name: layer_of[name].block or 0) for group in by_type.values()]
    if len(layer_of) > max_rows:
        each = max(1, max_rows // len(ordered))
        ordered = spread([spread(group, each) for group in ordered], max_rows)
    rows = []
    for group in ordered:
        for number, name in enumerate(group):
            layer = layer_of[name]
            parts = [] if number else [types[layer.type]]
            parts += [] if layer.block is None else [str(layer.block)]
            rows.append(Row(name, types[layer.type], "  ".join(parts)))
    return rows


def short_types(found: Iterable[Layer]) -> dict[str, str]:
    """What follows the block's number, without ``.weight``, by type; more of it where that would not be unique."""
    types = list(dict.fromkeys(layer.type for layer in found))
    short = {type_: (type_.rpartition("*.")[2] if "*." in type_ else type_).removesuffix(".weight") for type_ in types}
    counts = list(short.values())
    return {type_: name if counts.count(name) == 1 else type_ for type_, name in short.items()}


def spread(items: Sequence[_T], number: int) -> list[_T]:
    """At most so many of them, evenly spread, the first and the last among them."""
    if len(items) <= number:
        return list(items)
    if number == 1:
        return [items[-1]]
    return [items[round(place * (len(items) - 1) / (number - 1))] for place in range(number)]
