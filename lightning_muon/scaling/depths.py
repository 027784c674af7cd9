"""The depths of a model at which layers are compared over sizes."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["DEPTHS", "NO_DEPTH", "depth_classes"]

DEPTHS = ("mid-early", "mid", "mid-late", "final")
"""Blocks N/4, N/2, 3N/4 and N of N, as in arXiv 2606.04058."""

NO_DEPTH = "–"


def depth_classes(blocks: Collection[int], num_blocks: int) -> dict[int, str]:
    """Which blocks stand for which depth: for each depth, the nearest one.

    Blocks are numbered from 1 for that, so that the last one is N. Where one block is nearest to two depths, as in
    shallow models, it stands for the later. A depth of which no block is within N/8, half the distance between two
    depths, has none: of a type that only the first blocks have, none is final.

    Args:
        blocks: Numbers of the blocks that have a layer type, from 0.
        num_blocks: N.

    Returns:
        A depth for up to four blocks; for a type of one block, ``NO_DEPTH``.
    """
    if len(blocks) == 1:
        return dict.fromkeys(blocks, NO_DEPTH)
    found = {}
    for number, name in enumerate(DEPTHS, start=1):
        place = number * num_blocks / len(DEPTHS)
        nearest = min(blocks, key=lambda block: (abs(block + 1 - place), -block))
        if abs(nearest + 1 - place) <= max(0.5, num_blocks / 8):
            found[nearest] = name
    return found
