"""At which share of the steps one optimizer has reached the other's loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Crossing:
    """Attributes:
    share: Of the steps; ``None`` if the loss was not reached at the largest share that was tried.
    is_bound: All shares that were tried have reached it: the crossing is at the smallest or below.
    """

    share: float | None
    is_bound: bool = False


def crossing(losses: Mapping[float, float], target: float) -> Crossing:
    """From where on the losses stay at ``target`` or below, by a straight line between the shares that were tried.

    Args:
        losses: The loss at the end of a schedule of so large a share of the steps, each a run of its own; infinite
            where training diverged, from where no line leads: the crossing is then at the next share.
        target: The loss to reach.

    Raises:
        ValueError: Nothing was tried.
    """
    if not losses:
        raise ValueError("crossing: no share of the steps was tried")
    shares = sorted(losses)
    above = [number for number, share in enumerate(shares) if losses[share] > target]
    if not above:
        return Crossing(shares[0], is_bound=True)
    if above[-1] == len(shares) - 1:
        return Crossing(None)
    low, high = shares[above[-1]], shares[above[-1] + 1]
    if math.isinf(losses[low]):
        return Crossing(high)
    along = (losses[low] - target) / (losses[low] - losses[high])
    return Crossing(low + along * (high - low))


def smallest_sure(losses: Mapping[float, Mapping[int, float]], target: Mapping[int, float]) -> float | None:
    """The smallest share of the steps from which on every seed is below the target of the same seed.

    Args:
        losses: By share and seed.
        target: By seed.

    Returns:
        The share, at which and at all larger ones every seed is below; ``None`` if that is not so at the largest.
    """
    sure = None
    for share in sorted(losses, reverse=True):
        if not all(loss < target[seed] for seed, loss in losses[share].items()):
            break
        sure = share
    return sure
