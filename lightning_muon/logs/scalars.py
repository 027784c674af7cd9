"""Scalars of finished or running runs, from what Lightning's TensorBoard and CSV loggers write."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_muon.logs.model import LogError

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

__all__ = ["Series", "are_one_training", "find_runs", "read_scalars"]

Series = dict[int, float]
"""Value by optimizer step, in ascending order."""

_CSV, _EVENTS = "metrics.csv", "events.out.tfevents.*"
_SAME = 1e-6  # runs that agree so well are one run that was logged twice: TensorBoard keeps float32


def find_runs(folders: Iterable[str | Path]) -> list[Path]:
    """The folders, at or below these, that hold scalars: TensorBoard event files or a ``metrics.csv``.

    Args:
        folders: Where to look, at any depth.

    Returns:
        One folder per run, sorted, each once.

    Raises:
        LogError: One of ``folders`` is not there, or has no scalars at or below it.
    """
    runs: set[Path] = set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise LogError(f"{folder} is no folder: give the log_dir of a run, or a folder above it.")
        found = {file.parent.resolve() for name in (_CSV, _EVENTS) for file in folder.rglob(name)}
        if not found:
            raise LogError(f"{folder} has neither TensorBoard event files nor a {_CSV} at or below it.")
        runs |= found
    return sorted(runs)


def read_scalars(run: Path, prefix: str | tuple[str, ...] = "") -> dict[str, Series]:
    """The scalars of one run.

    Where a step was logged more than once, as by a resumed run, the later value counts.

    Args:
        run: A folder of ``find_runs``.
        prefix: Only keys that start so, or in one of these ways, are read.

    Raises:
        LogError: A file cannot be read, or needs ``tensorboard``, which is not installed.
    """
    found: dict[str, Series] = {}
    if any(run.glob(_EVENTS)):
        _read_events(run, prefix, found)
    if (run / _CSV).is_file():
        _read_csv(run / _CSV, prefix, found)
    return {key: dict(sorted(series.items())) for key, series in sorted(found.items())}


def are_one_training(run: Mapping[str, Series], other: Mapping[str, Series]) -> bool:
    """Whether two loggers have logged one training: the same keys and steps, and values that agree to float32."""
    if {key: list(series) for key, series in run.items()} != {key: list(series) for key, series in other.items()}:
        return False
    pairs = ((value, other[key][step]) for key, series in run.items() for step, value in series.items())
    return all(math.isclose(one, two, rel_tol=_SAME) or (math.isnan(one) and math.isnan(two)) for one, two in pairs)


def _read_events(run: Path, prefix: str | tuple[str, ...], found: dict[str, Series]) -> None:
    accumulator = _accumulator(run)
    accumulator.Reload()
    for key in accumulator.Tags()["scalars"]:
        if key.startswith(prefix):
            found.setdefault(key, {}).update({event.step: event.value for event in accumulator.Scalars(key)})


def _accumulator(run: Path) -> EventAccumulator:
    try:
        from tensorboard.backend.event_processing import event_accumulator
    except ImportError:
        raise LogError(
            f"{run} holds TensorBoard event files; to read them: pip install 'lightning-muon[tensorboard]'"
        ) from None
    # 0: keep every scalar, where TensorBoard would sample; 1: hardly anything of what is not read
    kinds = (event_accumulator.IMAGES, event_accumulator.HISTOGRAMS, event_accumulator.COMPRESSED_HISTOGRAMS)
    sizes = {event_accumulator.SCALARS: 0, event_accumulator.TENSORS: 1, **dict.fromkeys(kinds, 1)}
    return event_accumulator.EventAccumulator(str(run), size_guidance=sizes)


def _read_csv(path: Path, prefix: str | tuple[str, ...], found: dict[str, Series]) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        names = rows.fieldnames or []
        keys = [key for key in names if key.startswith(prefix) and key != "step"]
        if keys and "step" not in names:
            raise LogError(f"{path} has no column `step`: Lightning's CSVLogger writes one.")
        for row in rows:
            for key in keys:
                if row[key]:  # another call logged at this step
                    try:
                        found.setdefault(key, {})[int(row["step"])] = float(row[key])
                    except ValueError:
                        raise LogError(
                            f"{path}, line {rows.line_num}: {key}={row[key]!r} at step {row['step']!r} is no number."
                        ) from None
