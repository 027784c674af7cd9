"""Two learning rates and the initial scale by a full grid, which grows until the best rates are not on its edge."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

USUAL_INIT = 0.02  # of DeepSeek-V3


class Rates(NamedTuple):
    """What is tuned.

    Attributes:
        lr: The learning rate of the matrices.
        adamw_lr: That of the rest; ``None`` is the same for all.
        initializer_range: Standard deviation of the initial weights.
    """

    lr: float
    adamw_lr: float | None
    initializer_range: float = USUAL_INIT

    def times(self, number: float) -> Rates:
        """The matrices' rate so many times as high, the rest's as it is."""
        return self._replace(lr=self.lr * number)

    def text(self) -> str:
        """For tables."""
        return f"{self.lr:g}" if self.adamw_lr is None else f"{self.lr:g}, {self.adamw_lr:g}"


@dataclass(frozen=True)
class Grid:
    """All combinations of two lists of learning rates, each ascending by factors of two, and some initial scales.

    Attributes:
        lrs: Of the matrices.
        adamw_lrs: Of the rest; ``(None,)`` is one rate for everything, and no dimension to grow in.
        initializer_ranges: The initial scales; no dimension to grow in either.
    """

    lrs: tuple[float, ...]
    adamw_lrs: tuple[float | None, ...]
    initializer_ranges: tuple[float, ...] = (USUAL_INIT,)

    def points(self) -> list[Rates]:
        """All combinations."""
        return [Rates(*point) for point in itertools.product(self.lrs, self.adamw_lrs, self.initializer_ranges)]

    def around(self, best: Rates) -> Grid:
        """The grid itself if ``best`` is inside; else with one more value on each side where ``best`` is the last."""
        return Grid(_grown(self.lrs, best.lr), _grown(self.adamw_lrs, best.adamw_lr), self.initializer_ranges)


def _grown(values: tuple[float | None, ...] | tuple[float, ...], best: float | None) -> tuple[float, ...]:
    if best is None:
        return values  # type: ignore[return-value]
    known = [value for value in values if value is not None]
    lower = (known[0] / 2,) if best == known[0] else ()
    higher = (known[-1] * 2,) if best == known[-1] else ()
    return (*lower, *known, *higher)


@dataclass(frozen=True)
class Tuned:
    """What a search has found.

    Attributes:
        best: What had the lowest loss.
        losses: Of everything that was tried; infinite where training diverged.
        is_on_edge: The search was ended before the best rates were inside.
    """

    best: Rates
    losses: dict[Rates, float]
    is_on_edge: bool

    def at(self, initializer_range: float) -> Tuned:
        """What the same search has found at one initial scale, from the runs that there are.

        A search grows around its best rates at any scale: at this one the best may be on the edge, which is said.

        Raises:
            ValueError: The scale was not searched, or all runs at it diverged.
        """
        losses = {rates: loss for rates, loss in self.losses.items() if rates.initializer_range == initializer_range}
        if not losses:
            raise ValueError(f"Tuned.at: no run began at the scale {initializer_range:g}; the grid must have it")
        best = _best(f"scale {initializer_range:g}", losses)
        lrs, others = {rates.lr for rates in losses}, {rates.adamw_lr for rates in losses if rates.adamw_lr is not None}
        ends = [(min(one), max(one)) for one in (lrs, others) if one]
        is_on_edge = any(rate in end for rate, end in zip((best.lr, best.adamw_lr), ends, strict=False))
        return Tuned(best, losses, is_on_edge)


def tune(
    grids: Mapping[str, Grid],
    losses_of: Callable[[Sequence[tuple[str, Rates]]], Sequence[float]],
    max_growths: int | None = None,
) -> dict[str, Tuned]:
    """Searches several grids by the same rule, in rounds, so that all their runs can be done at once.

    Args:
        grids: Where each search begins, by its name.
        losses_of: The losses of pairs of a search's name and rates; what was asked for before is not asked for again.
        max_growths: Rounds after the first; ``None`` goes on until every search's best pair is inside its grid.

    Raises:
        ValueError: All of a search's runs diverged.
    """
    losses: dict[str, dict[Rates, float]] = {name: {} for name in grids}
    current, growths = dict(grids), 0
    while True:
        new = [(name, point) for name, grid in current.items() for point in grid.points() if point not in losses[name]]
        for (name, point), loss in zip(new, losses_of(new), strict=True):
            losses[name][point] = loss
        best = {name: _best(name, found) for name, found in losses.items()}
        grown = {name: grid.around(best[name]) for name, grid in current.items()}
        if grown == current or growths == max_growths:
            return {name: Tuned(best[name], losses[name], grown[name] != current[name]) for name in grids}
        current, growths = grown, growths + 1


def _best(name: str, losses: Mapping[Rates, float]) -> Rates:
    best = min(losses, key=lambda point: losses[point])
    if not math.isfinite(losses[best]):
        raise ValueError(f"tune: every run of {name!r} diverged: {[point.text() for point in losses]}")
    return best
