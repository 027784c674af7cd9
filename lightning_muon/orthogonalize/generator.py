"""Polar Express: the polynomials that bring an interval as close to 1 as any composition of that length can.

The best odd quintic on ``[lower, upper]`` deviates from 1 by the same amount, with alternating sign, at four points:
the ends and two in between. Remez' exchange finds them. Taking the best for what the steps before have left of the
interval gives the best composition (arXiv 2505.16932, theorem 3.1).
"""

from __future__ import annotations

import math
from functools import lru_cache

from lightning_muon.orthogonalize.sequence import Norm, PolynomialSequence, Steps

__all__ = ["best_quintic", "compose", "polar_express", "smallest_lower"]

_MOST_STEPS = 12
_MOST_EXCHANGES = 100
# so close to 1 the four equations are singular in float64; Taylor's polynomial at 1 is as good
_NEARLY_ONE = 1 - 5e-6


def best_quintic(lower: float, upper: float) -> tuple[float, float, float]:
    """``(a, b, c)`` that minimise the largest ``|1 - (ax + bx³ + cx⁵)|`` over ``[lower, upper]``.

    Args:
        lower: Positive.
        upper: At least ``lower``.
    """
    ratio = lower / upper
    if ratio > _NEARLY_ONE:
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    first, second = (3 * ratio + 1) / 4, (ratio + 3) / 4
    error = math.inf
    for _ in range(_MOST_EXCHANGES):
        a, b, c, deviation = _equioscillate((ratio, first, second, 1.0))
        if abs(deviation - error) <= 1e-15:
            break
        error = deviation
        root = math.sqrt(9 * b * b - 20 * a * c)  # of the derivative: its zeros are the new points
        first, second = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return a / upper, b / upper**3, c / upper**5


def _equioscillate(points: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """``(a, b, c, e)`` with ``ax + bx³ + cx⁵ = 1 ∓ e`` at the points, in turns, by Gaussian elimination."""
    rows = [[x, x**3, x**5, (-1.0) ** number, 1.0] for number, x in enumerate(points)]
    for column in range(4):
        pivot = max(range(column, 4), key=lambda row: abs(rows[row][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for row in range(column + 1, 4):
            factor = rows[row][column] / rows[column][column]
            rows[row] = [x - factor * y for x, y in zip(rows[row], rows[column], strict=True)]
    solution = [0.0] * 4
    for row in (3, 2, 1, 0):
        known = sum(rows[row][column] * solution[column] for column in range(row + 1, 4))
        solution[row] = (rows[row][4] - known) / rows[row][row]
    return solution[0], solution[1], solution[2], solution[3]


def compose(steps: int, lower: float, cushion: float, safety: float) -> tuple[Steps, float]:
    """The steps for ``[lower, 1]``, and the lowest output; the highest is as far above 1.

    Args:
        steps: How many.
        lower: The smallest singular value to bring near 1.
        cushion: A step is built for no smaller part of its interval than this; it keeps the values in the middle
            from being pushed so far down that rounding drowns them.
        safety: Every step but the last is evaluated at σ/safety, so that rounding beyond the interval does no harm.
    """
    upper, made = 1.0, []
    for number in range(steps):
        a, b, c = best_quintic(max(lower, cushion * upper), upper)
        if lower < cushion * upper:  # centre what the cushion has made lopsided
            ends = [x * (a + b * x**2 + c * x**4) for x in (lower, upper)]
            a, b, c = (2 * coefficient / sum(ends) for coefficient in (a, b, c))
        if number < steps - 1:
            a, b, c = a / safety, b / safety**3, c / safety**5
        made.append((a, b, c))
        lower = lower * (a + b * lower**2 + c * lower**4)
        upper = 2 - lower
    return tuple(made), lower


@lru_cache(maxsize=256, typed=True)
def polar_express(
    steps: int, lower: float, *, cushion: float = 0.02, safety: float = 1.02, norm: Norm = "frobenius"
) -> PolynomialSequence:
    """The Polar Express of a number of steps for singular values from ``lower`` on.

    ``polar_express(5, 1e-3)`` is ``"polar_express5"``.

    Args:
        steps: How many, 1 to 12.
        lower: The smallest normalised singular value to bring near 1, between 0 and 1.
        cushion: See ``compose``.
        safety: See there; the input is divided by it as well.
        norm: See ``PolynomialSequence``.

    Raises:
        ValueError: An argument out of range.
    """
    if not isinstance(steps, int) or not 1 <= steps <= _MOST_STEPS:
        raise ValueError(f"polar_express: steps={steps!r} must be between 1 and {_MOST_STEPS}.")
    if not 0 < lower < 1:
        raise ValueError(f"polar_express: lower={lower!r} must be between 0 and 1, both excluded.")
    if not 0 <= cushion < 1 or not 1 <= safety < 2:
        raise ValueError(f"polar_express: cushion={cushion!r} must be in [0, 1) and safety={safety!r} in [1, 2).")
    if norm not in ("frobenius", "schatten4"):
        raise ValueError(f"polar_express: norm={norm!r} is not known; choose 'frobenius' or 'schatten4'.")
    lower = float(lower)
    made, _ = compose(steps, lower, cushion, safety)
    source = f"Polar Express (arXiv 2505.16932) for σ ≥ {lower:g}, cushion {cushion:g}, safety {safety:g}"
    bare = PolynomialSequence(f"polar_express({steps}, {lower:g})", made, source, None, safety, norm)
    lowest = bare(lower)
    highest = max(bare.highest()[-1], 2 - lowest)
    return PolynomialSequence(bare.name, made, source, (lower, lowest, highest), safety, norm)


@lru_cache(maxsize=256)
def smallest_lower(steps: int, band: float, *, cushion: float = 0.02, safety: float = 1.02) -> float:
    """The smallest σ from which on a Polar Express of that many steps ends in ``[1 - band, 1 + band]``.

    To one part in a hundred, on the safe side.
    """
    too_small, enough = 1e-12, 1.0 - 1e-9
    while enough / too_small > 1.01:
        middle = math.sqrt(too_small * enough)
        made, _ = compose(steps, middle, cushion, safety)
        if PolynomialSequence("", made, "", None, safety)(middle) >= 1 - band:
            enough = middle
        else:
            too_small = middle
    return enough
