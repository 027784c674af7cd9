"""The pool, from outside: what it prints, what it keeps, and that it leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.claims.pool import run_all
from benchmarks.claims.run import find
from tests.claims.conftest import ROOT, tiny_run


def pool(folder: Path, kind: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.claims.pool_script", str(folder), kind],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_runs_are_done_once_and_never_again(tmp_path: Path) -> None:
    first = pool(tmp_path, "good")
    out, err = first.communicate(timeout=240)
    assert first.returncode == 0, err
    assert [line[:5] for line in out.splitlines()] == ["[1/2]", "[2/2]", "done "]  # the third is the first
    outcomes = [find(tiny_run(seed=seed), tmp_path) for seed in (1, 2)]
    assert out.splitlines()[-1] == "done " + " ".join(f"{one.val_loss:.4f}" for one in outcomes)
    assert "text: of" in (tmp_path / tiny_run().key / "log.txt").read_text()
    again = run_all([tiny_run(seed=1), tiny_run(seed=2)], tmp_path, ["cpu"])  # starts no process
    assert list(again.values()) == outcomes


def test_failed_run_is_reported_and_loses_no_other(tmp_path: Path) -> None:
    done = pool(tmp_path, "bad")
    out, err = done.communicate(timeout=240)
    assert done.returncode == 1
    assert "no_such_field" in err  # the end of its log
    assert "RuntimeError: 1 of 3 runs failed" in err
    assert all(find(tiny_run(seed=seed), tmp_path) for seed in (1, 2)), out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupt_ends_the_runs(tmp_path: Path, number: signal.Signals) -> None:
    running = pool(tmp_path, "slow")
    try:
        _interrupt(running, tmp_path, number)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
    assert not list(tmp_path.glob("*/result.json"))


def _interrupt(running: subprocess.Popen[str], folder: Path, number: signal.Signals) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*/log.txt"))) < 2:
        assert time.monotonic() < deadline, "the runs have not started"
        assert running.poll() is None, running.communicate()
        time.sleep(0.1)
    if number == signal.SIGINT:
        os.killpg(running.pid, number)  # as Ctrl-C does: to the runs too
    else:
        running.send_signal(number)
    running.wait(timeout=60)
    assert running.returncode != 0
    deadline = time.monotonic() + 60
    while alive := _members(running.pid):
        assert time.monotonic() < deadline, f"left running: {alive}"
        time.sleep(0.1)


def _members(session: int) -> list[str]:
    """The processes of a session that are not yet gone."""
    found = subprocess.run(["ps", "-o", "pid=,stat=,args=", "-s", str(session)], capture_output=True, text=True)
    return [line for line in found.stdout.splitlines() if line.split()[1][0] != "Z"]


def test_no_slot_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no device"):
        run_all([tiny_run()], tmp_path, [])
