"""Where an experiment's runs are done: tuned ones, and arms of an experiment for every seed."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.claims.description import Run
from benchmarks.claims.pool import run_all
from benchmarks.claims.run import Outcome
from benchmarks.claims.setting import TUNING_SEED, Setting
from benchmarks.claims.tuning import USUAL_INIT, Grid, Rates, Tuned, tune

Arms = dict[str, dict[int, Outcome]]
"""Outcomes by arm of an experiment and seed."""


@dataclass(frozen=True)
class Search:
    """What is tuned for what.

    Attributes:
        optimizer: ``"muon"`` or ``"adamw"``.
        share: Of the setting's steps: the length that it is tuned for.
        one_rate: A single learning rate for everything.
    """

    optimizer: str
    share: float = 1.0
    one_rate: bool = False

    def grid(self, grid: Grid) -> Grid:
        """Where the search begins."""
        return Grid(grid.lrs, (None,), grid.initializer_ranges) if self.one_rate else grid

    def run(self, setting: Setting, rates: Rates) -> Run:
        """One try."""
        return setting.run(self.optimizer, rates, TUNING_SEED, round(self.share * setting.steps))


USUAL_SEARCHES = {"adamw": Search("adamw"), "muon": Search("muon")}


@dataclass
class Laboratory:
    """Where an experiment's runs are done.

    Attributes:
        setting: Their length and text.
        seeds: Those that are reported.
        grid: Where the search for learning rates begins.
        max_growths: How often it may grow; ``None`` as often as it has to.
        folder: Where finished runs are.
        slots: The devices.
        options: The command line, for what an experiment adds to it.
        outcomes: All that was asked for, in order.
    """

    setting: Setting
    seeds: Sequence[int]
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
        """The best learning rates and initial scale of each search, on a seed of its own."""
        grids = {name: search.grid(self.grid) for name, search in searches.items()}

        def tried(points: Sequence[tuple[str, Rates]]) -> list[float]:
            runs = [searches[name].run(self.setting, rates) for name, rates in points]
            return [outcome.val_loss for outcome in self.do(runs)]

        return tune(grids, tried, self.max_growths)

    def tune_at_usual_scale(self) -> dict[str, Tuned]:
        """Of the usual searches the best learning rates at the usual initial scale, for both optimizers.

        For what compares weights, logits or one optimizer's variants: with scales of their own, the arms would not
        begin with the same weights, and what differs at the end could be the scale.
        """
        return {name: one.at(USUAL_INIT) for name, one in self.tune().items()}


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
