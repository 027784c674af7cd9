"""From a parameter's name to what layers of different depths and models have in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Layer", "layers"]


@dataclass(frozen=True)
class Layer:
    """Where a parameter is.

    Attributes:
        type: Its name with the block's number replaced by ``*``: ``model.layers.*.attn.q_proj.weight``.
        block: The block's number, from 0; ``None`` for what is in no repeated block.
        num_blocks: How many blocks the stack has; 0 for what is in none.
    """

    type: str
    block: int | None = None
    num_blocks: int = 0


def layers(names: Iterable[str]) -> dict[str, Layer]:
    """Find the repeated blocks in a model's parameter names.

    A segment of a name counts a repeated block if it is an integer, and the names with the same segments before it
    have at least two such integers with the same segments after. Of several in one name, the first one counts blocks:
    experts that are modules of their own keep their numbers, and so do the layers of a ``Sequential`` in a block.

    Args:
        names: The names of all parameters, or of all that are of interest, of one model.

    Returns:
        The layer of each name.
    """
    names = list(names)
    seen: dict[tuple[str, ...], dict[tuple[str, ...], set[int]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        parts = tuple(name.split("."))
        for place, part in enumerate(parts):
            if part.isdecimal():
                seen[parts[:place]][parts[place + 1 :]].add(int(part))
    # A stack's last block may lack what others have (dense layers first): its size is that of all of them together.
    num_blocks = {
        prefix: 1 + max(number for numbers in after.values() for number in numbers)
        for prefix, after in seen.items()
        if any(len(numbers) > 1 for numbers in after.values())
    }
    return {name: _layer(tuple(name.split(".")), num_blocks) for name in names}


def _layer(parts: tuple[str, ...], num_blocks: dict[tuple[str, ...], int]) -> Layer:
    for place, part in enumerate(parts):
        if part.isdecimal() and parts[:place] in num_blocks:
            kind = ".".join((*parts[:place], "*", *parts[place + 1 :]))
            return Layer(kind, int(part), num_blocks[parts[:place]])
    return Layer(".".join(parts))
