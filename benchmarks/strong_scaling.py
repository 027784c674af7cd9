"""The same global batch on 1, 2 and 4 processes of one machine: time of a training step.

``python -m benchmarks.strong_scaling [--json benchmarks/results/strong_scaling.json]``

The model, the variants and the turns of ``benchmarks.strategies``; the numbers of processes take turns too, within one
run: processes that a turn does not need wait. One thread per process; more processes than cores share them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.strategies import STEPS_PER_TURN, VARIANTS, state_bytes, variant
from benchmarks.timing import time_alternating
from examples.moe_lm.demo import environment

GLOBAL_BATCH = 16  # windows of 128 tokens


def _wait() -> None:
    """A process' turn when it is not needed."""


def _run(rank: int, counts: list[int], store: str, rounds: int, path: Path | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=max(counts))
    windows = torch.randint(0, 257, (GLOBAL_BATCH, 129), generator=torch.Generator().manual_seed(0))
    turns, state = {}, {}
    for count in counts:
        group = dist.new_group(list(range(count)))
        for name in VARIANTS:
            turns[name, count] = _wait
            if rank < count:
                turns[name, count], optimizer = variant(name, windows.chunk(count)[rank], group)
                turns[name, count]()  # AdamW has no state before its first step
                state[name, count] = state_bytes(optimizer)
    labels = {f"{name}, {count}": turn for (name, count), turn in turns.items()}
    seconds = time_alternating(labels, rounds, before=dist.barrier)
    if rank == 0:
        rows: dict[str, dict[str, Any]] = {name: {} for name in VARIANTS}
        for name, count in turns:
            values = [1e3 * turn / STEPS_PER_TURN for turn in seconds[f"{name}, {count}"]]
            low, median, high = statistics.quantiles(values, n=4)
            rows[name][str(count)] = {
                "median_ms": median,
                "quartiles_ms": [low, high],
                "speedup": rows[name][str(counts[0])]["median_ms"] / median if rows[name] else 1.0,
                "state_bytes_of_process_0": state[name, count],
            }
        _report(rows, rounds, path)
    dist.barrier()
    dist.destroy_process_group()


def _report(rows: dict[str, dict[str, Any]], rounds: int, path: Path | None) -> None:
    print(f"{'':24}{'processes':>10}{'median ms':>11}{'quartiles':>18}{'speed-up':>10}{'state MiB':>11}")
    for name, by_count in rows.items():
        for count, row in by_count.items():
            quartiles = "{:.1f} – {:.1f}".format(*row["quartiles_ms"])
            print(
                f"{name:24}{count:>10}{row['median_ms']:>11.1f}{quartiles:>18}{row['speedup']:>10.2f}"
                f"{row['state_bytes_of_process_0'] / 2**20:>11.2f}"
            )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figures = {
            "title": f"training step, {GLOBAL_BATCH * 128} tokens over all processes",
            "rounds": rounds,
            "steps_per_turn": STEPS_PER_TURN,
            "rows": rows,
            **environment(),
        }
        path.write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="the first is the reference")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.processes, f"{folder}/store", options.rounds, options.json)
        mp.spawn(_run, arguments, nprocs=max(options.processes))  # type: ignore[attr-defined,no-untyped-call]


if __name__ == "__main__":
    main()
