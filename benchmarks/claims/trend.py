"""Learning rates of a size that was not tuned, from sizes that were."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from benchmarks.claims.tuning import Rates


def rates_at(width: int, tuned: Mapping[int, Rates]) -> Rates:
    """The tuned rates where there are some; else where the straight line through their logarithms over log width leads,
    and the initial scale of the widest.

    Args:
        width: The size.
        tuned: The best rates by width.

    Raises:
        ValueError: Nothing was tuned.
    """
    if not tuned:
        raise ValueError("rates_at: no size was tuned; tune at least the smallest")
    if width in tuned:
        return tuned[width]
    return Rates(
        _extended(width, {w: rates.lr for w, rates in tuned.items()}),
        _extended(width, {w: rates.adamw_lr for w, rates in tuned.items() if rates.adamw_lr is not None}),
        tuned[max(tuned)].initializer_range,
    )


def _extended(width: int, by_width: Mapping[int, float]) -> float:
    if len(by_width) == 1:
        return next(iter(by_width.values()))
    slope, intercept = np.polyfit(np.log(list(by_width)), np.log(list(by_width.values())), 1)
    return math.exp(intercept + slope * math.log(width))
