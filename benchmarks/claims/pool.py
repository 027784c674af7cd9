"""Many runs at once: one process each, as many at a time as there are slots.

A slot is a device's name; ``["cpu", "cpu"]`` are two processes of one thread each. Processes are forked from one that
has imported everything and done nothing, so that a short run does not spend its time on imports.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims.description import Run
from benchmarks.claims.run import Outcome, do, find
from lightning_muon.checkpoint.atomic import replacing

_LINES_OF_A_LOG = 15
_SECONDS_TO_END = 10.0


def default_slots() -> list[str]:
    """Every GPU, or every core where there is none."""
    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cpu"] * (os.cpu_count() or 1)


def run_all(runs: Iterable[Run], folder: Path, slots: Sequence[str]) -> dict[str, Outcome]:
    """Does what is not done yet, and prints a line as each run finishes.

    Args:
        runs: The runs, in the order in which to start them; one that is named twice is done once.
        folder: Has a folder for each run, named by its key: ``run.json``, ``result.json``, ``log.txt``.
        slots: The device of each process that may run at a time.

    Returns:
        What came out, by the runs' keys.

    Raises:
        RuntimeError: Runs failed; the ends of their logs were printed. All others are done, and their results kept.
        ValueError: There is no slot.
    """
    if not slots:
        raise ValueError("run_all: there is no device to run on; name some, ['cpu'] for instance")
    wanted = {run.key: run for run in runs}
    done = {key: outcome for key, run in wanted.items() if (outcome := find(run, folder)) is not None}
    waiting = [run for key, run in wanted.items() if key not in done]
    if done:
        print(f"{len(done)} of {len(wanted)} runs are done already", flush=True)
    failed: list[str] = []
    free = list(slots)
    active: dict[Any, tuple[ForkServerProcess, Run, str]] = {}  # by sentinel
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.claims.train"])
    try:
        while waiting or active:
            while waiting and free:
                run, device = waiting.pop(0), free.pop(0)
                process = context.Process(target=_work, args=(run, folder / run.key, device), name=run.key)
                process.start()
                active[process.sentinel] = (process, run, device)
            for sentinel in wait(list(active)):
                process, run, device = active.pop(sentinel)
                process.join()
                free.append(device)
                outcome = find(run, folder) if process.exitcode == 0 else None
                if outcome is None:
                    failed.append(str(folder / run.key / "log.txt"))
                    print(f"FAILED {run.key}, exit code {process.exitcode}:", file=sys.stderr)
                    print(_end_of_log(folder / run.key), file=sys.stderr, flush=True)
                else:
                    done[run.key] = outcome
                    print(f"[{len(done) + len(failed)}/{len(wanted)}] {_line(outcome)}", flush=True)
    finally:
        _end(process for process, _, _ in active.values())
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(wanted)} runs failed; the others are kept. See {', '.join(failed)}")
    return {key: done[key] for key in wanted}


def _work(run: Run, folder: Path, device: str) -> None:
    """In the run's own process: what it prints goes into its log."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the pool too, which ends this process
    threading.Thread(target=_end_with_the_pool, daemon=True).start()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "run.json") as staged:
        staged.write_text(run.to_json() + "\n")
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    do(run, folder, device)


def _end_with_the_pool() -> None:
    """However the pool ends, by a signal that it cannot catch for instance, its runs do not go on without it."""
    pool = multiprocessing.parent_process()
    assert pool is not None
    pool.join()
    os._exit(1)


def _end(processes: Iterable[ForkServerProcess]) -> None:
    left = list(processes)
    for process in left:
        process.terminate()
    for process in left:
        process.join(_SECONDS_TO_END)
        if process.is_alive():
            process.kill()
            process.join()


def _line(outcome: Outcome) -> str:
    diverged = outcome.figures["diverged"]
    result = f"loss {outcome.val_loss:.4f}" if diverged is None else "diverged"
    return f"{outcome.run.key}: {result}, {outcome.figures['seconds']:.0f} s"


def _end_of_log(folder: Path) -> str:
    path = folder / "log.txt"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else ["(no log)"]
    return "\n".join(f"    {line}" for line in lines[-_LINES_OF_A_LOG:])
