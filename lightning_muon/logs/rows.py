"""Layers as the rows of a picture: those of a type together, by depth, and no more than fit."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lightning_muon.logs.layers import Layer, layers

__all__ = ["Row", "arrange", "short_types", "spread"]

_T = TypeVar("_T")
# Of each type; with fewer there is nothing to see of the depth.
_FEWEST_ROWS = 4
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        name: Of the parameter or module.
        type: Its layer type, short.
        label: What stands beside the row: the type and the block at the first row of a type, the block at the others;
            with the expert's number after the block's where experts are one type.
    """

    name: str
    type: str
    label: str


def arrange(names: Iterable[str], max_rows: int) -> list[Row]:
    """Order layers by type, and by depth within it.

    Args:
        names: In any order; types come in the order of their first names.
        max_rows: Of more layers, blocks spread over the depth are taken, of every type as many. Where these would be
            few, types that differ by a number only, as experts do that are modules of their own, count as one.

    Returns:
        The rows from top to bottom.
    """
    layer_of = layers(names)
    types = short_types(layer_of.values())
    type_of = {name: types[layer.type] for name, layer in layer_of.items()}
    has_too_many = len(layer_of) > max_rows
    if has_too_many and len(types) > max_rows // _FEWEST_ROWS:
        type_of = {name: _NUMBER.sub("*", type_) for name, type_ in type_of.items()}
    by_type: dict[str, list[str]] = defaultdict(list)
    for name, type_ in type_of.items():
        by_type[type_].append(name)
    ordered = [sorted(group, key=_numbers) for group in by_type.values()]
    if has_too_many:
        each = max(1, max_rows // len(ordered))
        ordered = spread([spread(group, each) for group in ordered], max_rows)
    return [
        Row(name, type_of[name], _label(type_of[name], layer_of[name], is_first=not number))
        for group in ordered
        for number, name in enumerate(group)
    ]


def _label(type_: str, layer: Layer, is_first: bool) -> str:
    numbers = [] if layer.block is None else [str(layer.block)]
    if "*" in type_ and layer.block is not None:  # which of the experts, say
        numbers = [".".join([*numbers, *_NUMBER.findall(layer.type)])]
    return "  ".join([type_] * is_first + numbers)


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(map(int, _NUMBER.findall(name)))


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
