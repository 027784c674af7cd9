"""Student's t distribution for whole degrees of freedom, in closed form: no need of scipy."""

from __future__ import annotations

import math
from functools import lru_cache

__all__ = ["t_quantile", "t_within"]


def t_within(t: float, degrees: int) -> float:
    """P(|T| < t) for ``degrees`` degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):  # cosines up to the power degrees - 2
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@lru_cache
def t_quantile(confidence: float, degrees: int) -> float:
    """The ``t`` with P(|T| < t) = ``confidence``: half the width of a two-sided interval, in standard errors.

    Args:
        confidence: Between 0 and 1.
        degrees: Degrees of freedom; with none there is nothing to judge by, and the answer is infinite.
    """
    if degrees < 1:
        return math.inf
    low, high = 0.0, 1.0
    while t_within(high, degrees) < confidence:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):  # until float64 has nothing between
        low, high = (middle, high) if t_within(middle, degrees) < confidence else (low, middle)
    return high
