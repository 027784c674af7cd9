"""Steps to AdamW's loss: what is made of losses that are known, and the whole command on a few steps."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.claims import steps_to_loss
from benchmarks.claims.steps_to_loss import findings, headline, summarize, tables
from tests.claims.conftest import ROOT, few_steps

ADAMW = {1: 1.50, 2: 1.52, 3: 1.54}
ONE_RATE = {1: 1.70, 2: 1.72, 3: 1.74}


def muon(at_60: dict[int, float]) -> dict[float, dict[int, float]]:
    others = {0.4: 1.75, 0.45: 1.70, 0.5: 1.65, 0.55: 1.60, 1.0: 1.40}
    return {**{share: dict.fromkeys(ADAMW, loss) for share, loss in others.items()}, 0.6: at_60}


def results(at_60: dict[int, float], adamw: dict[int, float] = ADAMW, one_rate: dict[int, float] = ONE_RATE) -> dict:
    """As they come out of the file; of arms with a run that diverged, there are no losses."""
    losses = muon(at_60)
    whole = {"adamw": adamw, "adamw_one_rate": one_rate, "muon": losses[1.0]}
    whole |= {str(share): by_seed for share, by_seed in losses.items() if share < 1}
    gone = {arm: [2] for arm, by_seed in whole.items() if math.inf in by_seed.values()}
    found = {
        "steps": 600,
        "seeds": [1, 2, 3],
        "shares": sorted(share for share in losses if share < 1),
        "tuning": {
            name: {"lr": 4e-3, "adamw_lr": 1.6e-2, "initializer_range": 0.02, "is_on_edge": False, "tried": []}
            for name in ("adamw", "muon", "muon_short", "adamw_one_rate")
        },
        "diverged": gone,
        "val_loss": {arm: by_seed for arm, by_seed in whole.items() if arm not in gone},
        **summarize(losses, adamw, one_rate),
    }
    return json.loads(json.dumps(found, allow_nan=False))


def test_claim_that_is_seen() -> None:
    found = results({1: 1.49, 2: 1.51, 3: 1.50})
    assert found["against_adamw"]["0.6"]["mean"] == pytest.approx(-0.02)
    assert found["against_adamw"]["0.6"]["seeds_below"] == 3
    assert found["sure_share"] == 0.6
    # straight lines from 1.60 at 55 % to the losses at 60 %
    by_seed = {"1": 0.55 + 0.05 * 0.10 / 0.11, "2": 0.55 + 0.05 * 0.08 / 0.09, "3": 0.55 + 0.05 * 0.06 / 0.10}
    assert found["step_ratio"]["by_seed"] == pytest.approx(by_seed)
    assert found["step_ratio"]["mean"] == pytest.approx(sum(by_seed.values()) / 3)
    assert found["one_rate_against_adamw"]["mean"] == pytest.approx(0.2)
    assert found["sure_share_against_one_rate"] == 0.5
    assert found["step_ratio_against_one_rate"]["by_seed"] == pytest.approx({"1": 0.45, "2": 0.43, "3": 0.41})
    said = findings(found)
    assert said[0].startswith("- Seen: ")
    assert "is 60 %" in said[1]


@pytest.mark.parametrize(
    "at_60",
    [
        {1: 1.51, 2: 1.40, 3: 1.40},  # one seed above
        {1: 1.55, 2: 1.55, 3: 1.55},
    ],
)
def test_claim_that_is_not_seen(at_60: dict[int, float]) -> None:
    said = findings(results(at_60))
    assert said[0].startswith("- Not seen: ")
    assert "is 100 %" in said[1]


def test_bounds_and_what_is_never_reached_are_said() -> None:
    found = results(dict.fromkeys(ADAMW, 1.58))
    mostly = {share: {1: 1.0, 2: 2.0, 3: 2.0} for share in muon({})}
    found |= json.loads(json.dumps(summarize(mostly, ADAMW, ONE_RATE)))
    said = " ".join(findings(found))
    assert "At no share of the steps" in said
    assert "1 of 3 seeds were there at the smallest share already" in said
    assert "without 2 of 3 seeds, which were above at the largest" in said


def test_share_that_diverged_is_said_and_is_not_below(tmp_path: Path) -> None:
    found = results({1: 1.0, 2: math.inf, 3: 1.0})
    assert "0.6" not in found["against_adamw"]
    assert found["sure_share"] == 1.0
    assert found["step_ratio"]["by_seed"]["2"] == 1.0  # no line leads from a loss that there is none of
    said = findings(found)
    assert said[0] == "- 0.6: training diverged with seed 2; left out."
    assert said[1].startswith("- Not seen: tuned Muon at 60 %")
    assert "| Muon, 60 % | 360 |  |  |  | diverged |  |  |  |" in tables(found)
    steps_to_loss.draw(found, tmp_path / "found.png")


@pytest.mark.parametrize("gone", ["adamw", "one_rate"])
def test_target_that_diverged_leaves_the_rest_to_report(gone: str, tmp_path: Path) -> None:
    at_60 = dict.fromkeys(ADAMW, 1.45)
    found = results(at_60, **{gone: {1: 1.5, 2: math.inf, 3: 1.5}})
    text = tables(found)
    assert text.count("| diverged |") == 1
    assert "The trap" not in text
    assert ("- Not seen: tuned Muon at 60 %" in text) == (gone == "adamw")
    assert ("- Seen: tuned Muon at 60 %" in text) == (gone == "one_rate")
    steps_to_loss.draw(found, tmp_path / "found.png")


def test_table_has_every_loss() -> None:
    text = tables(results({1: 1.491, 2: 1.512, 3: 1.503}))
    assert "| Muon, 60 % | 360 | 1.491 | 1.512 | 1.503 | 1.502 ± 0.011 | -0.018 | 3 of 3 |" in text
    assert "| AdamW | 600 | 1.500 | 1.520 | 1.540 | 1.520 ± 0.020 |  |  |  |" in text


def test_headline_has_the_claim_alone() -> None:
    text = headline(results({1: 1.491, 2: 1.512, 3: 1.503}))
    assert text.splitlines()[2:5] == [
        "| AdamW | 600 | 1.520 ± 0.020 |  |  |",
        "| Muon, 60 % of the steps | 360 | 1.502 ± 0.011 | -0.018 | 3 of 3 |",
        "| Muon, 100 % of the steps | 600 | 1.400 ± 0.000 | -0.120 | 3 of 3 |",
    ]
    mean = 100 * sum((0.55 + 0.05 * 0.1 / 0.109, 0.55 + 0.05 * 0.08 / 0.088, 0.55 + 0.05 * 0.06 / 0.097)) / 3
    assert text.endswith(f"from {mean:.1f} ± 0.9 % of AdamW's steps on (mean ± sd over the seeds).")
    text = headline(results(dict.fromkeys(ADAMW, 1.45), {1: 1.5, 2: math.inf, 3: 1.5}))
    assert text.splitlines()[2:4] == [
        "| AdamW | 600 | diverged |  |  |",
        "| Muon, 60 % of the steps | 360 | 1.450 ± 0.000 |  |  |",
    ]


def test_whole_command(tmp_path: Path) -> None:
    """Every run of it, on a few steps of the real model; again, nothing is trained."""
    command = [sys.executable, "-m", steps_to_loss.__name__, "--shares", "0.5"]
    command += few_steps(20, [1, 2], ROOT / "docs", tmp_path / "runs")
    command += ["--json", "found.json", "--picture", "pictures/found.png"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = [
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    found = json.loads((tmp_path / "found.json").read_text())
    assert tables(found) in out[0]
    assert tables(found) in out[1]
    assert "10 of 10 runs are done already" in out[1]
    assert "[" not in out[1]
    assert (tmp_path / "pictures" / "found.png").stat().st_size > 10_000
    assert len(found["runs"]) == 18
    assert {run["steps"] for run in found["runs"]} == {20, 12, 10}
    assert {run["seed"] for run in found["runs"] if run["steps"] < 20} == {1, 2, 100}
    assert found["commit"] in (None, *found["commits_of_runs"])
    losses = [run["val_loss"] for run in found["runs"] if run["optimizer"] == "adamw" and run["seed"] == 1]
    assert losses == [found["val_loss"]["adamw"]["1"], found["val_loss"]["adamw_one_rate"]["1"]]


def test_luck_of_the_tuning_seeds_is_said() -> None:
    found = results({1: 1.49, 2: 1.51, 3: 1.50})
    assert not any("luck" in line for line in findings(found))  # nothing was tried
    best = {"lr": 4e-3, "adamw_lr": 1.6e-2, "initializer_range": 0.02}
    found["tuning"]["adamw"]["tried"] = [
        {**best, "lr": 8e-3, "val_loss": {"100": 1.48, "101": 1.56}},
        {**best, "val_loss": {"100": 1.50, "101": 1.51}},
        {**best, "lr": 1.6e-2, "val_loss": {"100": None}},
    ]
    found["tuning"]["muon_short"]["tried"] = [{**best, "val_loss": {"100": 1.51, "101": 1.50}}]
    assert findings(found)[-1].endswith(
        "searched on: AdamW's lowest was 1.480 on the first, what was chosen has 1.505 on all and 1.520 on the reported"
        " ones; Muon's shorter one lowest was 1.510 on the first, what was chosen has 1.505 on all and 1.500 on the"
        " reported ones."
    )
