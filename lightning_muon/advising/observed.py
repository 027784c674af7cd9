"""What a run's logs say of the spectra that its last quarter had to cope with."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

from lightning_muon.advising.advice import Need
from lightning_muon.advising.places import places
from lightning_muon.logs import LogError, ModelDescription, Series, are_one_training, find_runs, read_scalars

__all__ = ["PERCENTS", "Observed", "observe"]

PERCENTS = (10, 25, 50, 75, 90, 95)
_PREFIX, _STEPS = "muon/momentum_", "muon/ns_steps/"


@dataclass(frozen=True)
class Observed:
    """A run.

    Attributes:
        run: The folder of its logs.
        repeats: Folders where other loggers logged the same.
        model: What it trained.
        steps: The logged steps that count, ascending.
        needs: Of the parameters that are wanted and were logged.
        unknown: Parameters that Muon trains, and whose spectra were not logged or not wanted.
    """

    run: Path
    repeats: tuple[Path, ...]
    model: ModelDescription
    steps: tuple[int, ...]
    needs: tuple[Need, ...]
    unknown: tuple[str, ...]


def observe(folder: str | Path, percent: int, include: str | None = None, exclude: str | None = None) -> Observed:
    """Read a run.

    Args:
        folder: Its logs, or a folder above them that has no other run with momentum spectra. Of several loggers that
            logged the same run, one is read.
        percent: The quantile that is wanted.
        include: Regular expression that a parameter's name must match somewhere; ``None`` takes all.
        exclude: Regular expression that it must not match.

    Raises:
        LogError: There is no such run, or there are several; or a file cannot be read.
    """
    logged = {run: read_scalars(run, (_PREFIX, _STEPS)) for run in find_runs([folder])}
    found = [run for run, scalars in logged.items() if any(key.startswith(f"{_PREFIX}q") for key in scalars)]
    runs = [
        run for n, run in enumerate(found) if not any(are_one_training(logged[run], logged[one]) for one in found[:n])
    ]
    if len(runs) != 1:
        raise LogError(
            f"{folder} has no run with {_PREFIX}q{percent}/<parameter>: train with MomentumSpectrumMonitor, which"
            " measures every 200 steps unless every_n_steps= says otherwise, or in a Fabric loop with"
            " log_optimizer(families=MomentumSpectrumMonitor.families)"
            if not runs
            else f"{folder} has several runs: give the folder of one of them, {', '.join(map(str, runs))}"
        )
    (run,) = runs
    model, scalars = ModelDescription.read(run), logged[run]
    place_of, needs, seen = places(model.parameters), [], set()
    for name, description in model.parameters.items():
        ranks = _lowest_series(scalars, "participation_rank", name)
        sigmas = {p: series for p in PERCENTS if (series := _lowest_series(scalars, f"q{p}", name))}
        is_wanted = re.search(include or "", name) and not (exclude and re.search(exclude, name))
        if is_wanted and ranks and percent in sigmas:
            window = _window(set(ranks).intersection(*sigmas.values()))
            if window:
                seen |= set(window)
                lowest = {p: min(series[step] * ranks[step] ** 0.25 for step in window) for p, series in sigmas.items()}
                by_step = {step: (sigmas[percent][step] * ranks[step] ** 0.25, ranks[step]) for step in window}
                rank, taken = min(ranks[step] for step in window), _steps_taken(scalars, name, window)
                needs.append(Need(name, place_of[name], description, lowest, rank, by_step, taken))
    if not needs:
        raise LogError(
            f"{run} has no {_PREFIX}q{percent} and {_PREFIX}participation_rank of a parameter that is wanted: see to"
            " --include and --exclude, and to what MomentumSpectrumMonitor, or log_optimizer(families=), was told"
        )
    known = {need.name for need in needs}
    unknown = tuple(name for name in model.parameters if name not in known)
    repeats = tuple(one for one in found if one != run)
    return Observed(run, repeats, model, tuple(sorted(seen)), tuple(needs), unknown)


def _steps_taken(scalars: Mapping[str, Series], name: str, window: Iterable[int]) -> tuple[int, int, int] | None:
    """The fewest, the median and the most iteration steps."""
    key = f"{_STEPS}{name}"
    median = scalars.get(key, {})
    steps = [step for step in window if median.get(step, 0) >= 1]
    if not steps:
        return None
    fewest = min(scalars.get(f"{key}.min", median).get(step, median[step]) for step in steps)
    most = max(scalars.get(f"{key}.max", median).get(step, median[step]) for step in steps)
    return int(fewest), int(median_low(median[step] for step in steps)), int(most)


def _lowest_series(scalars: Mapping[str, Series], family: str, name: str) -> Series:
    """Of the matrices of a parameter; steps at which it is no number do not count."""
    key = f"{_PREFIX}{family}/{name}"
    series = scalars.get(f"{key}.min", scalars.get(key, {}))
    return {step: value for step, value in series.items() if math.isfinite(value)}


def _window(steps: Iterable[int]) -> list[int]:
    """The last quarter, rounded up."""
    ordered = sorted(steps)
    return ordered[-math.ceil(len(ordered) / 4) :]
