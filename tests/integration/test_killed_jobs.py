"""Training jobs that lose a process around a save: the other one ends, and ``ckpt_path="last"`` goes on, to the bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.killed_jobs import SAVE_EVERY, VARIANTS

pytestmark = pytest.mark.timeout(600)  # they take 88 s of processor time, and the machine may be busy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    command = [sys.executable, "-m", "tests.killed_jobs", str(tmp_path_factory.mktemp("killed"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # every checkpoint that had a name was loaded there
    return json.loads(done.stdout)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_other_process_ends_by_itself(jobs, variant):
    for kill in jobs[variant]["kills"]:
        victim, codes = kill["victim"], kill["codes"]
        assert codes[victim] == -9
        assert codes[1 - victim] == 1, kill


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_left_was_saved_by_the_uninterrupted_run_too(jobs, variant):
    expected = jobs[variant]["saved_without_kills"]
    for kill in jobs[variant]["kills"]:
        for step, digest in [kill["last"], *kill["others"]]:
            assert step == 0 or expected[str(step)] == digest, kill


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_steps_since_the_last_completed_save_are_lost(jobs, variant):
    for kill in jobs[variant]["kills"]:
        completed, begun = kill["allowed"]
        assert completed <= kill["last"][0] <= begun, kill
        assert kill["first_save"] == kill["resumed_at"] + SAVE_EVERY, kill


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_job_reaches_its_end_as_if_nothing_had_been(jobs, variant):
    job = jobs[variant]
    assert job["codes"] == [0, 0], job["errors"]
    assert job["equal"]
    assert not [name for name in job["left"] if name.startswith(".last")], "the next save clears up"


def test_kills_hit_saves(jobs):
    kills = [kill for job in jobs.values() for kill in job["kills"]]
    assert len(kills) >= 20
    assert {kill["victim"] for kill in kills} == {0, 1}
    assert sum(kill["in_save"] for kill in kills) >= 5
