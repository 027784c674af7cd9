"""Layers that are given the same sequence: a type, and a quarter of the model's depth."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_muon.logs import layers

__all__ = ["Place", "places"]

_QUARTERS = 4


@dataclass(frozen=True, order=True)
class Place:
    """A layer type at a depth.

    Attributes:
        type: A parameter's name with ``*`` for the block's number, and for all numbers after it: experts that are
            modules of their own are one type.
        blocks: Numbers of the blocks, ascending; empty outside of repeated blocks.
    """

    type: str
    blocks: tuple[int, ...] = ()

    @property
    def depth(self) -> str:
        """The blocks in words: ``0-3``."""
        if not self.blocks:
            return "–"
        first, last = self.blocks[0], self.blocks[-1]
        if last - first + 1 != len(self.blocks):
            return ",".join(map(str, self.blocks))
        return str(first) if first == last else f"{first}-{last}"

    def pattern(self, all_blocks: bool = False) -> str:
        """A regular expression for the names of its parameters.

        Args:
            all_blocks: For those in any block.
        """
        head, *tails = self.type.split("*")
        if not self.blocks:
            return f"^{re.escape(self.type)}$"
        number = r"\d+" if all_blocks else "|".join(map(str, self.blocks))
        number = f"({number})" if "|" in number else number
        return f"^{re.escape(head)}{number}" + r"\d+".join(map(re.escape, tails)) + "$"


def places(names: Iterable[str]) -> Mapping[str, Place]:
    """The place of each parameter.

    Args:
        names: Of all parameters of a model that Muon trains.
    """
    found = {}
    blocks: dict[tuple[str, int], set[int]] = defaultdict(set)
    for name, layer in layers(names).items():
        if layer.block is None:
            found[name] = (layer.type, -1)
            continue
        head, _, tail = layer.type.partition("*")
        key = (f"{head}*" + re.sub(r"\.\d+(?=\.|$)", ".*", tail), layer.block * _QUARTERS // layer.num_blocks)
        found[name] = key
        blocks[key].add(layer.block)
    return {name: Place(key[0], tuple(sorted(blocks.get(key, ())))) for name, key in found.items()}
