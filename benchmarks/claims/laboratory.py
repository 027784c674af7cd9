"""Where an experiment's runs are done: tuned ones, and arms of an experiment for every seed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.claims.description import Run
from benchmarks.claims.pool import run_all
from benchmarks.claims.run import Outcome
from benchmarks.claims.setting import Setting
from benchmarks.claims.tuning import USUAL_INIT, Grid, Rates, Try, Tuned, tune

Arms = dict[str, dict[int, Outcome]]
"""Outcomes by arm of an experiment and seed."""


@dataclass(frozen=True)
class Search:
    """What is tuned for what.

    Attributes:
        optimizer: ``"muon"`` or ``"adamw"``.
        share: Of the setting's steps: the length that it is tuned for.
        one_rate: A single learning rate for everything.
        usual_scale: From the usual initial scale alone.
    """

    optimizer: str
    share: float = 1.0
    one_rate: bool = False
    usual_scale: bool = False

    def grid(self, grid: Grid) -> Grid:
        """Where the search begins."""
        adamw_lrs = (None,) if self.one_rate else grid.adamw_lrs
        scales = (USUAL_INIT,) if self.usual_scale else grid.initializer_ranges
        return Grid(grid.lrs, adamw_lrs, scales)

    def run(self, setting: Setting, rates: Rates, seed: int) -> Run:
        """One try."""
        return setting.run(self.optimizer, rates, seed, round(self.share * setting.steps))


USUAL_SEARCHES = {"adamw": Search("adamw"), "muon": Search("muon")}

SEARCHES_AT_USUAL_SCALE = {name: replace(search, usual_scale=True) for name, search in USUAL_SEARCHES.items()}
"""For what compares weights, logits or one optimizer's variants: with scales of their own, the arms would not begin
with the same weights, and what differs at the end could be the scale."""


@dataclass
class Laboratory:
    """Where an experiment's runs are done.

    Attributes:
        setting: Their length and text.
        seeds: Those that are reported.
        tuning_seeds: Those that rates are tuned on, see `tune`.
        grid: Where the search for learning rates begins.
        max_growths: How often it may grow; ``None`` as often as it has to.
        folder: Where finished runs are.
        slots: The devices.
        options: The command line, for what an experiment adds to it.
        outcomes: All that was asked for, in order.
    """

    setting: Setting
    seeds: Sequence[int]
    tuning_seeds: Sequence[int]
    grid: Grid
    max_growths: int | None
    folder: Path
    slots: Sequence[str]
    options: argparse.Namespace
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def do(self, runs: Iterable[Run]) -> list[Outcome]:
        """What came out of each."""
        wanted = list(runs)
        self.outcomes |= run_all(wanted, self.folder, self.slots)
        return [self.outcomes[run.key] for run in wanted]

    def do_arms(self, arms: Mapping[str, Mapping[int, Run]]) -> Arms:
        """The same for several arms of an experiment, each with a run for every seed."""
        self.do(run for by_seed in arms.values() for run in by_seed.values())
        return {arm: {s: self.outcomes[run.key] for s, run in by_seed.items()} for arm, by_seed in arms.items()}

    def tune(self, searches: Mapping[str, Search] = USUAL_SEARCHES) -> dict[str, Tuned]:
        """The best learning rates and initial scale of each search, on seeds of their own."""
        grids = {name: search.grid(self.grid) for name, search in searches.items()}
        return self.search(grids, lambda name, rates, seed: searches[name].run(self.setting, rates, seed))

    def search(
        self,
        grids: Mapping[str, Grid],
        run_of: Callable[[str, Rates, int], Run],
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Tuned]:
        """The same for runs of another kind: ``run_of`` makes one of a search's name, rates and seed."""

        def losses_of(tries: Sequence[Try]) -> list[float]:
            return [outcome.val_loss for outcome in self.do(run_of(*one) for one in tries)]

        return tune(grids, losses_of, self.tuning_seeds if seeds is None else seeds, self.max_growths)


def without_diverged(arms: Arms) -> tuple[Arms, dict[str, list[int]]]:
    """The arms of which every run has a loss, and the seeds of the others that diverged."""
    diverged = {
        arm: [seed for seed, outcome in by_seed.items() if outcome.has_diverged] for arm, by_seed in arms.items()
    }
    whole = {arm: by_seed for arm, by_seed in arms.items() if not diverged[arm]}
    return whole, {arm: seeds for arm, seeds in diverged.items() if seeds}


def losses_of(arms: Arms) -> dict[str, dict[int, float]]:
    """The validation losses."""
    return {arm: {seed: outcome.val_loss for seed, outcome in by_seed.items()} for arm, by_seed in arms.items()}
