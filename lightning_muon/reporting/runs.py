"""The runs of a report: their scalars, and what is known of them besides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from os.path import commonpath
from pathlib import Path

from lightning_muon.logs import (
    LogError,
    MissingDescriptionError,
    ModelDescription,
    Series,
    are_one_training,
    find_runs,
    read_scalars,
)
from lightning_muon.logs.keys import matrix_names, own_keys

__all__ = ["Run", "Runs", "read_runs"]

_EVENTS_STARTED = re.compile(r"events\.out\.tfevents\.(\d{9,10})\.")


@dataclass(frozen=True, eq=False)  # two runs are never the same one
class Run:
    """A run.

    Attributes:
        folder: Of its logs.
        label: What tells it from the others.
        scalars: Value by step, by key.
        model: What it trained; ``None`` where nobody described it.
        include: Regular expression that a layer's name must match somewhere.
        exclude: Regular expression that it must not match.
    """

    folder: Path
    label: str
    scalars: Mapping[str, Series]
    model: ModelDescription | None
    include: str | None = None
    exclude: str | None = None

    def without_filters(self) -> Run:
        """The same, with all its layers."""
        return replace(self, include=None, exclude=None)

    def family(self, family: str) -> dict[str, Series]:
        """The wanted layers' own values by name; those of Muon in the model's order, the others after them."""
        keys = own_keys(self.scalars, family)
        order = {name: place for place, name in enumerate(self.model.parameters if self.model else ())}
        names = sorted(keys, key=lambda name: (order.get(name, len(order)), name))
        return {name: self.scalars[keys[name]] for name in names if self._wants(name)}

    @cached_property
    def matrices(self) -> frozenset[str]:
        """Parameters that are matrices, as far as the logs tell."""
        return matrix_names(self.scalars)

    @property
    def last_step(self) -> int:
        """The last at which anything was logged."""
        return max((step for series in self.scalars.values() for step in series), default=0)

    @property
    def started(self) -> str | None:
        """When the first event file was opened, in UTC; ``None`` where there is none."""
        stamps = [int(found[1]) for file in self.folder.iterdir() if (found := _EVENTS_STARTED.match(file.name))]
        return _date(min(stamps)) if stamps else None

    @property
    def last_written(self) -> str:
        """When the logs were last written to, in UTC, as the file system has it."""
        files = [*self.folder.glob("events.out.tfevents.*"), *self.folder.glob("metrics.csv")]
        return _date(max(file.stat().st_mtime for file in files))

    def _wants(self, name: str) -> bool:
        is_included = re.search(self.include or "", name) is not None
        return is_included and not (self.exclude and re.search(self.exclude, name))


@dataclass
class Runs:
    """Those of a report, and what was left out."""

    runs: list[Run] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_runs(folders: Sequence[str | Path], include: str | None = None, exclude: str | None = None) -> Runs:
    """Read all runs at or below ``folders``.

    Args:
        folders: Log folders, or folders above them; runs are in their order.
        include: Regular expression that a layer's name must match somewhere; ``None`` takes all.
        exclude: Regular expression that it must not match.

    Raises:
        LogError: A folder or a file cannot be read, or nothing was logged.
    """
    found = Runs()
    logged: dict[Path, dict[str, Series]] = {}
    for folder in dict.fromkeys(run for above in folders for run in find_runs([above])):
        scalars = read_scalars(folder)
        repeated = next((other for other, its in logged.items() if _are_one(folder, scalars, other, its)), None)
        if repeated is not None:
            found.notes.append(f"{folder} repeats the figures of {repeated}: left out")
        elif scalars:
            logged[folder] = scalars
        else:
            found.notes.append(f"{folder} has no scalars: left out")
    if not logged:
        raise LogError(f"no scalars were logged at or below {', '.join(map(str, folders))}.")
    labels = _labels(list(logged))
    for folder, scalars in logged.items():
        try:
            model = ModelDescription.read(folder)
        except MissingDescriptionError:
            model = None
        found.runs.append(Run(folder, labels[folder], scalars, model, include, exclude))
    return found


def _are_one(folder: Path, scalars: Mapping[str, Series], other: Path, its: Mapping[str, Series]) -> bool:
    """Whether two loggers have logged one training. Loggers of one kind are two trainings, though their figures agree:
    those of both strategies do, from one seed."""
    kinds = [bool(list(one.glob("events.out.tfevents.*"))) for one in (folder, other)]
    return kinds[0] != kinds[1] and bool(scalars) and are_one_training(scalars, its)


def _labels(folders: list[Path]) -> dict[Path, str]:
    if len(folders) == 1:
        (folder,) = folders
        return {folder: "/".join(folder.parts[-2:])}
    common = Path(commonpath(folders))
    parts = {folder: folder.relative_to(common).parts or (folder.name,) for folder in folders}
    if len({part[-1] for part in parts.values()}) == 1 and all(len(part) > 1 for part in parts.values()):
        parts = {folder: part[:-1] for folder, part in parts.items()}  # Lightning's version_0 says nothing then
    return {folder: "/".join(part) for folder, part in parts.items()}


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
