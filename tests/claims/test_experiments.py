"""The experiments from end to end, on a few steps; and the page that they are written into."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.claims import write_docs
from benchmarks.claims.setting import MODEL
from benchmarks.claims.write_docs import EXPERIMENTS, PAGE, README, RESULTS, written, written_readme
from tests.claims.conftest import ROOT

SMALLER = ["scale_rule", "weight_decay", "svd_entropy", "attention_logits", "loss_curves"]  # the others have their own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands have left their results."""
    path = tmp_path_factory.mktemp("experiments")
    command = [sys.executable, "-m", "tests.claims.experiments_script", str(path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path / "out.txt").write_text(done.stdout)
    return path


@pytest.mark.parametrize("name", SMALLER)
def test_results_are_printed_written_and_drawn(folder: Path, name: str) -> None:
    results = json.loads((folder / f"{name}.json").read_text())
    assert EXPERIMENTS[name](results) in (folder / "out.txt").read_text()
    assert (folder / "pictures" / f"{name}.png").stat().st_size > 10_000
    assert results["experiment"] == name
    assert results["text_sha256"]
    assert all(run["diverged"] is None for run in results["runs"])


def test_table_1_is_of_a_wide_dense_model(folder: Path) -> None:
    runs = json.loads((folder / "scale_rule.json").read_text())["runs"]
    wide = [run for run in runs if run.get("orthogonalization") == "keller5"]
    assert [run.get("scale_rule", "adjusted") for run in wide] == ["baseline", "update_norm", "adjusted"]
    for run in wide:
        assert run["model"]["intermediate_size"] == 4 * run["model"]["hidden_size"] == 4 * MODEL["hidden_size"]
        assert run["model"]["first_k_dense_replace"] == run["model"]["num_hidden_layers"]


def test_rms_of_the_update_shows_in_the_weights(folder: Path) -> None:
    rms = json.loads((folder / "scale_rule.json").read_text())["mlp_rms"]
    weights = [rms[f"Muon's rates, {target:g}"]["1"] for target in (0.05, 0.1, 0.2, 0.4, 0.8)]
    assert weights == sorted(weights)
    assert weights[-1] > 1.02 * weights[0]  # in ten steps


def test_runs_that_experiments_share_are_done_once(folder: Path) -> None:
    keys = {name: {run["key"] for run in json.loads((folder / f"{name}.json").read_text())["runs"]} for name in SMALLER}
    tuning = set.intersection(*keys.values())
    assert len(tuning) == 4
    reported = keys["svd_entropy"] - tuning
    assert len(reported) == 4
    assert len(keys["scale_rule"] & reported) == len(keys["weight_decay"] & reported) == 1
    assert len(list((folder / "runs" / "cpu").iterdir())) == len(set.union(*keys.values()))


def test_page_is_made_from_the_results(folder: Path) -> None:
    page = PAGE.read_text()
    text = written(page, folder, folder / "pictures")
    assert written(text, folder, folder / "pictures") == text
    for name in SMALLER:
        assert EXPERIMENTS[name](json.loads((folder / f"{name}.json").read_text())) in text
        assert f"![{name.replace('_', ' ')}](pictures/{name}.png)" in text
    assert text.count("There are no results here yet.") == len(EXPERIMENTS) - len(SMALLER)
    in_short = text[: text.index("## How")]
    verdicts = [line for line in text[text.index("## How") :].splitlines() if line.startswith(("- Seen", "- Not seen"))]
    assert len(verdicts) >= len(SMALLER)
    assert in_short.count("| seen |") == sum(line.startswith("- Seen") for line in verdicts)
    assert in_short.count("| not seen |") == sum(line.startswith("- Not seen") for line in verdicts)
    assert "[SVD entropy](#svd-entropy)" in in_short
    assert written(text, RESULTS) == written(page, RESULTS)  # nothing of it stays behind


def test_committed_pages_say_what_the_committed_results_say() -> None:
    assert written(PAGE.read_text(), RESULTS) == PAGE.read_text(), "run python -m benchmarks.claims.write_docs"
    assert written_readme(README.read_text(), RESULTS) == README.read_text(), (
        "run python -m benchmarks.claims.write_docs"
    )


def test_page_without_a_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="no place for steps_to_loss"):
        written("nothing", RESULTS)
    with pytest.raises(ValueError, match="no place for steps_to_loss_longer"):
        written_readme("nothing", RESULTS)


def test_command_writes_other_pages(folder: Path) -> None:
    pictures, out = folder / "pictures", folder / "pages"
    out.mkdir()
    before = [PAGE.read_text(), README.read_text()]
    write_docs.main(["--results", str(folder), "--pictures", str(pictures), "--out", str(out)])
    assert (out / "evidence.md").read_text() == written(before[0], folder, pictures)
    assert (out / "README.md").read_text() == written_readme(before[1], folder)
    assert [PAGE.read_text(), README.read_text()] == before
