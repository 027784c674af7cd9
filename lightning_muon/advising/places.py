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
        type: As ``lightning-muon fit`` has it: a parameter's name with ``*`` for the block's number. Numbers after it
            stay: the layers of a ``Sequential`` in a block have little in common.
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
        if not self.blocks:
            return f"^{re.escape(self.type)}$"
        head, _, tail = self.type.partition("*")
        number = r"\d+" if all_blocks else "|".join(map(str, self.blocks))
        number = f"({number})" if "|" in number else number
        return f"^{re.escape(head)}{number}{re.escape(tail)}$"


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
        found[name] = (layer.type, layer.block * _QUARTERS // layer.num_blocks)
        blocks[found[name]].add(layer.block)
    return {name: Place(key[0], tuple(sorted(blocks.get(key, ())))) for name, key in found.items()}
