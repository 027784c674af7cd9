"""``python -m tests.claims.pool_script FOLDER good|bad|slow``: runs a pool, for tests that look at it from outside."""

import signal
import sys
from pathlib import Path

from benchmarks.claims.pool import run_all
from tests.claims.conftest import TINY, tiny_run

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without it
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    runs = [tiny_run(seed=1), tiny_run(seed=2), tiny_run(seed=1)]
    if kind == "bad":
        runs.insert(1, tiny_run(model={**TINY, "no_such_field": 1}))
    if kind == "slow":
        runs = [tiny_run(seed=seed, steps=100_000) for seed in (1, 2)]
    done = run_all(runs, folder, ["cpu"] * (2 if kind == "slow" else 1))
    print("done", *(f"{outcome.val_loss:.4f}" for outcome in done.values()))
