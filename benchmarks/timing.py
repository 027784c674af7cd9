"""Alternating measurements: these machines are noisy, so what is compared runs in one go, in turns."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from examples.moe_lm.environment import environment

__all__ = ["report", "time_alternating", "write"]


def time_alternating(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 3,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each call, by name; the calls take turns, ``rounds`` times. ``before`` each, its time not counted."""
    for step in steps.values():
        for _ in range(warmup):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            before()
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title: str, seconds: Mapping[str, list[float]], baseline: str, path: Path | None, **more: Any) -> None:
    """Print medians, quartiles and ratios to ``baseline``; write them with the environment if ``path`` is given."""
    reference = statistics.median(seconds[baseline])
    print(f"\n{title}\n{'':28}{'median ms':>10}{'quartiles':>18}{'ratio':>7}")
    rows = {}
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        rows[name] = {"median_ms": 1e3 * median, "quartiles_ms": [1e3 * low, 1e3 * high], "ratio": median / reference}
        print(f"{name:28}{1e3 * median:>10.2f}{f'{1e3 * low:.2f} – {1e3 * high:.2f}':>18}{median / reference:>7.2f}")
    if path is not None:
        rounds = len(next(iter(seconds.values())))
        write(path, title=title, baseline=baseline, rounds=rounds, rows=rows, **more)


def write(path: Path, **figures: Any) -> None:
    """Figures, with hardware, versions and commit, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**figures, **environment()}, indent=2) + "\n")
