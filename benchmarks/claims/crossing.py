"""At which share of the steps one optimizer has reached the other's loss."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Crossing:
    """Attributes:
    share: Of the steps; ``None`` if the loss was never reached.
    is_bound: The smallest share that was tried has reached it already: the crossing is there or below.
    """

    share: float | None
    is_bound: bool = False


def crossing(losses: Mapping[float, float], target: float) -> Crossing:
    """Where the losses first come down to ``target``, by a straight line between the shares that were tried.

    Args:
        losses: The loss at the end of a schedule of so large a share of the steps, each a run of its own.
        target: The loss to reach.

    Raises:
        ValueError: Nothing was tried.
    """
    if not losses:
        raise ValueError("crossing: no share of the steps was tried")
    shares = sorted(losses)
    if losses[shares[0]] <= target:
        return Crossing(shares[0], is_bound=True)
    for low, high in itertools.pairwise(shares):
        if losses[high] <= target:
            along = (losses[low] - target) / (losses[low] - losses[high])
            return Crossing(low + along * (high - low))
    return Crossing(None)


def smallest_sure(losses: Mapping[float, Mapping[int, float]], target: Mapping[int, float]) -> float | None:
    """The smallest share of the steps at which every seed is below the target of the same seed.

    Args:
        losses: By share and seed.
        target: By seed.
    """
    sure = [share for share, by_seed in losses.items() if all(loss < target[seed] for seed, loss in by_seed.items())]
    return min(sure, default=None)
