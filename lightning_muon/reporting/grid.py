"""Values of layers over time as a matrix, no wider than can be seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lightning_muon.logs import Series
from lightning_muon.logs.rows import spread

__all__ = ["Grid", "color_limits", "grid", "thin"]

# Of the values, beyond which the colours do not change: one layer must not flatten the others.
_TAILS = (1, 99)


@dataclass(frozen=True)
class Grid:
    """Layers × time.

    Attributes:
        steps: ``(columns,)``, ascending.
        values: ``(rows, columns)``; NaN where nothing was logged.
        logged_steps: How many there were before thinning.
    """

    steps: tuple[int, ...]
    values: NDArray[np.float64]
    logged_steps: int


def grid(series: Sequence[Series], max_columns: int) -> Grid:
    """Put series under each other.

    Args:
        series: One for each row; they need not have the same steps.
        max_columns: Of more steps, so many are kept, evenly spread, the first and the last among them. A row that was
            not logged at one of them shows its latest value since the one before.

    Returns:
        Logged values as they are, none in between or averaged.
    """
    steps = sorted(set().union(*series))
    kept = spread(steps, max_columns)
    column_of = dict(zip(steps, np.searchsorted(kept, steps).tolist(), strict=True))
    values = np.full((len(series), len(kept)), np.nan)
    for row, one in enumerate(series):
        for step, value in one.items():  # ascending: the latest stays
            values[row, column_of[step]] = value
    return Grid(tuple(kept), values, len(steps))


def color_limits(values: NDArray[np.float64]) -> tuple[float, float]:
    """From where to where the colours go: the 1st to the 99th percentile, of what is finite.

    Args:
        values: Of any shape; none needs to be finite.
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0, 1.0
    low, high = np.percentile(finite, _TAILS)
    margin = 1e-3 * max(abs(float(low)), 1e-9) if low == high else 0.0
    return float(low) - margin, float(high) + margin


def thin(series: Mapping[int, float], max_points: int) -> tuple[list[int], list[float]]:
    """A curve of fewer points that looks the same: the smallest and the largest of neighbours are kept.

    Args:
        series: Value by step, ascending.
        max_points: At most so many, 4 or more.

    Returns:
        Steps and values, as logged; what is not finite is left out.
    """
    points = [(step, value) for step, value in series.items() if np.isfinite(value)]
    if len(points) > max_points:
        inner = points[1:-1]
        edges = np.linspace(0, len(inner), (max_points - 2) // 2 + 1).astype(int).tolist()
        parts = [inner[start:stop] for start, stop in pairwise(edges)]
        extremes = {pick(part, key=lambda point: point[1]) for part in parts if part for pick in (min, max)}
        points = [points[0], *sorted(extremes), points[-1]]
    return [step for step, _ in points], [value for _, value in points]
