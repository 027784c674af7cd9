"""From the logs of runs to the points that laws are fitted to."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lightning_muon.logs import (
    LogError,
    MissingDescriptionError,
    ModelDescription,
    Series,
    find_runs,
    layers,
    read_scalars,
)
from lightning_muon.scaling.depths import DEPTHS, NO_DEPTH, depth_classes

__all__ = ["Ladder", "Place", "Point", "read_ladder", "value_of_run"]

# Two runs that agree so well are one run that was logged twice: TensorBoard keeps float32.
_SAME = 1e-6


@dataclass(frozen=True)
class Place:
    """What is compared over sizes: a layer type at a depth."""

    type: str
    depth: str

    def __str__(self) -> str:
        return self.type if self.depth == NO_DEPTH else f"{self.type} {self.depth}"


@dataclass(frozen=True)
class Point:
    """One run's value at a place.

    Attributes:
        run: The folder of its logs.
        size: Its model's trained parameters.
        sigma: The quantile of the spectrum.
        rank: ``min(rows, cols)`` of the matrices.
    """

    run: str
    size: int
    sigma: float
    rank: int


@dataclass
class Ladder:
    """Runs of several sizes.

    Attributes:
        points: By place; layer types in alphabetical order, depths from early to late.
        warnings: What was left out, and why.
    """

    points: dict[Place, list[Point]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def value_of_run(series: Series) -> float | None:
    """A run's value: the geometric mean over the last quarter of the logged steps.

    The spectrum of the momentum settles after a burn-in; the last quarter, rounded up to whole steps, is taken to be
    behind it. Steps at which the value is not positive and finite do not count.

    Returns:
        The mean, or ``None`` if no step counts.
    """
    window = list(series.values())[-math.ceil(len(series) / 4) :]
    logs = [math.log(value) for value in window if 0 < value < math.inf]
    return math.exp(sum(logs) / len(logs)) if logs else None


def read_ladder(
    folders: Iterable[str | Path], quantile: str = "q50", include: str | None = None, exclude: str | None = None
) -> Ladder:
    """Read the runs at or below ``folders``.

    Args:
        folders: Log folders, or folders above them.
        quantile: Which logged quantile, as ``"q50"``.
        include: Regular expression that a parameter's name must match somewhere; ``None`` takes all.
        exclude: Regular expression that it must not match.

    Raises:
        LogError: A folder or a file cannot be read, or no run has a description and the quantile of a parameter that
            is wanted.
    """
    prefix = f"muon/momentum_{quantile}/"
    ladder = Ladder()
    runs: list[dict[Place, Point]] = []
    missing: MissingDescriptionError | None = None
    for folder in find_runs(folders):
        scalars = read_scalars(folder, prefix)
        if not scalars:
            ladder.warnings.append(f"{folder} logged no {prefix}…: left out")
            continue
        values = {name.removeprefix(prefix): series for name, series in scalars.items()}
        try:
            run = _points(folder, values, re.compile(include or ""), re.compile(exclude or r"(?!)"), ladder.warnings)
        except MissingDescriptionError as error:
            ladder.warnings.append(f"{folder} has no muon_model.json, which says how large the model is: left out")
            missing = error
            continue
        if any(_same(run, other) for other in runs):
            ladder.warnings.append(f"{folder} repeats the figures of another run: left out")
        elif run:
            runs.append(run)
    if not runs:
        raise missing or LogError(
            f"no run logged {prefix}<parameter> of a parameter that is wanted: train with MomentumSpectrumMonitor, or"
            " in a Fabric loop with log_optimizer(families=MomentumSpectrumMonitor.families), and see to --include and"
            " --exclude."
        )
    order = (*DEPTHS, NO_DEPTH)
    places = {place for run in runs for place in run}
    for place in sorted(places, key=lambda place: (place.type, order.index(place.depth))):
        ladder.points[place] = sorted((run[place] for run in runs if place in run), key=lambda point: point.size)
    return ladder


def _points(
    folder: Path, values: Mapping[str, Series], include: re.Pattern[str], exclude: re.Pattern[str], warnings: list[str]
) -> dict[Place, Point]:
    model = ModelDescription.read(folder)
    layer_of = layers(model.parameters)
    blocks: dict[str, set[int]] = defaultdict(set)
    for layer in layer_of.values():
        if layer.block is not None:
            blocks[layer.type].add(layer.block)
    points = {}
    for name, layer in layer_of.items():
        if name not in values or not include.search(name) or exclude.search(name):
            continue
        depth: str | None = NO_DEPTH
        if layer.block is not None:
            depth = depth_classes(blocks[layer.type], layer.num_blocks).get(layer.block)
        sigma = value_of_run(values[name])
        if sigma is None:
            warnings.append(f"{folder}: {name} has no positive value in the last quarter of its steps: left out")
        elif depth is not None:
            rank = model.parameters[name].rank
            points[Place(layer.type, depth)] = Point(str(folder), model.num_parameters, sigma, rank)
    return points


def _same(run: Mapping[Place, Point], other: Mapping[Place, Point]) -> bool:
    if not run or run.keys() != other.keys():
        return False
    return all(
        one.size == other[place].size and math.isclose(one.sigma, other[place].sigma, rel_tol=_SAME)
        for place, one in run.items()
    )
