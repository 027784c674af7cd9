"""Two learning rates and the initial scale by a full grid, which grows until the best rates are not on its edge.

The best of many on one seed is in part that seed's luck, and the more were tried the more so. What is nearly the best
on the first seed is therefore repeated on others, and the best of these finalists is the one with the lowest mean.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

USUAL_INIT = 0.02  # of DeepSeek-V3
FINALISTS = 4  # at least
MARGIN = 0.03  # nats: what one seed may hide, about twice the spread of the same rates from seed to seed


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


class Try(NamedTuple):
    """A run of a search.

    Attributes:
        search: Its name.
        rates: What is tried.
        seed: The seed.
    """

    search: str
    rates: Rates
    seed: int


Losses = dict[Rates, dict[int, float]]
"""Losses by rates and seed, infinite where training diverged."""


@dataclass(frozen=True)
class Tuned:
    """What a search has found.

    Attributes:
        best: The finalist with the lowest mean loss.
        losses: Of everything that was tried: of finalists on all seeds, of the others on the first one.
        is_on_edge: The search was ended before the best rates were inside.
    """

    best: Rates
    losses: Losses
    is_on_edge: bool


def tune(
    grids: Mapping[str, Grid],
    losses_of: Callable[[Sequence[Try]], Sequence[float]],
    seeds: Sequence[int],
    max_growths: int | None = None,
) -> dict[str, Tuned]:
    """Searches several grids by the same rule, in rounds, so that all their runs can be done at once.

    A round tries a grid's new points on the first seed; the finalists of all so far, those within `MARGIN` of the
    lowest and `FINALISTS` at least, on the other seeds too; and lets the grid grow around the finalist with the
    lowest mean.

    Args:
        grids: Where each search begins, by its name.
        losses_of: Does runs and returns their losses; what was asked for before is not asked for again.
        seeds: One or more.
        max_growths: Rounds after the first; ``None`` goes on until every search's best rates are inside its grid.

    Raises:
        ValueError: All of a search's finalists diverged.
    """
    losses: dict[str, Losses] = {name: {} for name in grids}
    current, growths = dict(grids), 0

    def run(tries: Sequence[Try]) -> None:
        new = [one for one in tries if one.seed not in losses[one.search].get(one.rates, {})]
        for one, loss in zip(new, losses_of(new), strict=True):
            losses[one.search].setdefault(one.rates, {})[one.seed] = loss

    while True:
        run([Try(name, point, seeds[0]) for name, grid in current.items() for point in grid.points()])
        run([Try(name, one, s) for name in grids for one in _finalists(losses[name], seeds[0]) for s in seeds[1:]])
        best = {name: _best(name, found, seeds) for name, found in losses.items()}
        grown = {name: grid.around(best[name]) for name, grid in current.items()}
        if grown == current or growths == max_growths:
            return {name: Tuned(best[name], losses[name], grown[name] != current[name]) for name in grids}
        current, growths = grown, growths + 1


def _finalists(losses: Losses, seed: int) -> list[Rates]:
    finite = sorted(
        (rates for rates, by_seed in losses.items() if math.isfinite(by_seed[seed])), key=lambda one: losses[one][seed]
    )
    return [
        one for i, one in enumerate(finite) if i < FINALISTS or losses[one][seed] <= losses[finite[0]][seed] + MARGIN
    ]


def _best(name: str, losses: Losses, seeds: Sequence[int]) -> Rates:
    means = {rates: fmean(by_seed.values()) for rates, by_seed in losses.items() if len(by_seed) == len(seeds)}
    best = min(means, key=lambda rates: means[rates], default=None)
    if best is None or not math.isfinite(means[best]):
        raise ValueError(f"tune: every run of {name!r} diverged: {[point.text() for point in losses]}")
    return best
