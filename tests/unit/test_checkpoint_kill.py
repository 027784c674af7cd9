"""A process that is killed while it saves leaves the old checkpoint or the new one, whole, under the name."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    command = [sys.executable, "-m", "tests.killed_saves", str(tmp_path_factory.mktemp("killed"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # every checkpoint was loaded there
    return json.loads(done.stdout)


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_at_a_random_moment(kills, folder):
    random = [kill for kill in kills if kill["kind"] == "random" and kill["folder"] == folder]
    assert len(random) >= 20
    for kill in random:
        assert kill["found"] in kill["allowed"], kill
        assert kill["survivors"] == [1] * folder, "the other process raises"
    assert sum(kill["torn"] for kill in random) >= 3, "kills must hit the middle of saves"


@pytest.mark.parametrize("new", [False, True], ids=["by a file", "by a folder"])
@pytest.mark.parametrize("old", [False, True], ids=["a file replaced", "a folder replaced"])
def test_between_any_two_changes_of_the_file_system(kills, old, new):
    points = [kill for kill in kills if kill["kind"] == f"{old}->{new}"]
    found = Counter(kill["found"] for kill in points)
    assert set(found) == {1, 2}, "kills before and after the swap"
    assert [kill["found"] for kill in points] == sorted(kill["found"] for kill in points)
    assert len(points) >= (15 if new else 5)
