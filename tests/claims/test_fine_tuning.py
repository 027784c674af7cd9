"""Fine-tuning as a run, and the experiment of the four pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.claims import fine_tuning
from benchmarks.claims.run import do
from benchmarks.claims.train import train
from tests.claims.conftest import few_steps, tiny_run


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """Short questions, each with its answer."""
    path = tmp_path / "conversations.jsonl"
    lines = [json.dumps({"prompt": f"{n} and {n}?", "response": str(2 * n)}) for n in range(250)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_run_begins_with_the_checkpoint_and_learns_answers(tmp_path: Path, conversations: Path) -> None:
    common = {"files": (str(conversations),), "seq_len": 48, "batch_size": 8}
    kept = do(tiny_run(keep_checkpoint=True, **common), tmp_path / "kept", "cpu")
    tuned = {"start_from": str(kept.checkpoint), "adamw_lr": None, **common}
    still = train(tiny_run(lr=1e-12, steps=1, **tuned))
    assert still["text_loss"] == pytest.approx(kept.val_loss, abs=2e-2)  # other windows of the same text
    assert still["val_loss"] == pytest.approx(still["val_loss_before"], abs=1e-6)
    learnt = train(tiny_run(lr=1e-2, steps=8, **tuned))
    assert learnt["val_loss_before"] == pytest.approx(still["val_loss_before"], abs=1e-6)
    assert learnt["val_loss"] < learnt["val_loss_before"] - 0.1
    assert learnt["text_sha256"] == still["text_sha256"] != kept.figures["text_sha256"]


def test_whole_way(tmp_path: Path, conversations: Path) -> None:
    arguments = few_steps(8, [1], conversations, tmp_path / "runs")
    results = fine_tuning.run([*arguments, "--picture", str(tmp_path / "pairs.png")])
    assert set(results["val_loss"]) == {"muon/muon", "muon/adamw", "adamw/muon", "adamw/adamw"}
    before = results["val_loss_before"]
    assert before["muon/muon"] == before["muon/adamw"] != before["adamw/adamw"] == before["adamw/muon"]
    assert results["conversations_sha256"] != results["text_sha256"]
    assert (tmp_path / "pairs.png").stat().st_size > 10_000
    assert "trained with" in fine_tuning.tables(results)


def results(losses: dict[str, list[float]]) -> dict:
    by_seed = {pair: dict(enumerate(values, start=1)) for pair, values in losses.items()}
    compared = {
        trained: fine_tuning.paired(by_seed[f"{trained}/muon"], by_seed[f"{trained}/adamw"]).asdict()
        for trained in ("muon", "adamw")
    }
    rates = {pair: {"lr": 1e-3, "adamw_lr": 2e-3, "is_on_edge": pair == "muon/adamw"} for pair in losses}
    best = {pair: fine_tuning.paired(by_seed["muon/muon"], by_seed[pair]).asdict() for pair in list(by_seed)[1:]}
    found = {"seeds": [1, 2], "val_loss": by_seed, "muon_against_adamw": compared, "best_against": best}
    text = {pair: {seed: 2 * loss for seed, loss in losses.items()} for pair, losses in by_seed.items()}
    return {**found, "text_loss": text, "fine_tuning_rates": rates, "diverged": {}}


def test_findings() -> None:
    seen = {"muon/muon": [1.0, 1.1], "muon/adamw": [1.2, 1.3], "adamw/muon": [1.4, 1.5], "adamw/adamw": [1.3, 1.4]}
    said = fine_tuning.findings(results(seen))
    assert [line.split(":")[0] for line in said[:3]] == ["- Seen"] * 3
    assert said[3] == (
        "- Plain text afterwards, on Muon's checkpoint: Muon's loss minus AdamW's is -0.400, above in 0 of 2 seeds."
    )
    assert said[4] == (
        "- Plain text afterwards, on AdamW's checkpoint: Muon's loss minus AdamW's is +0.200, above in 2 of 2 seeds."
    )
    assert said[5] == "- The search ended on the edge for AdamW on Muon's checkpoint."
    assert "Of 2 seeds it is below AdamW on Muon's checkpoint in 2; Muon on AdamW's checkpoint in 2" in said[0]
    other = {**seen, "muon/muon": [1.0, 1.4], "adamw/muon": [1.0, 1.0]}
    said = fine_tuning.findings(results(other))
    assert [line.split(":")[0] for line in said[:3]] == ["- Not seen"] * 3
    assert "mean is that of Muon on AdamW's checkpoint" in said[0]
    better_in_the_mean = {**seen, "muon/muon": [1.0, 1.31]}
    assert fine_tuning.findings(results(better_in_the_mean))[0].startswith("- Not seen")
    equal = {**seen, "adamw/muon": [1.3, 1.5]}  # one seed is equal
    assert fine_tuning.findings(results(equal))[2].startswith("- Not seen: on AdamW's checkpoint Muon is worse")


def test_pair_that_diverged_is_said_and_nothing_is_seen_of_it(tmp_path: Path) -> None:
    found = results(
        {"muon/muon": [1.0, 1.1], "muon/adamw": [1.2, 1.3], "adamw/muon": [1.4, 1.5], "adamw/adamw": [1, 1]}
    )
    for key in ("val_loss", "best_against", "fine_tuning_rates"):
        del found[key]["adamw/adamw"]
    del found["muon_against_adamw"]["adamw"]
    found |= {"diverged": {"AdamW on AdamW's checkpoint": [2]}, "text_loss": found["val_loss"]}
    said = fine_tuning.findings(found)
    assert said[0] == "- AdamW on AdamW's checkpoint: training diverged with seed 2; left out."
    assert said[1].startswith("- Not seen: Muon on Muon's checkpoint is better than each other pair")
    assert said[2].startswith("- Seen: Muon is better than AdamW on Muon's checkpoint")
    assert not any("on AdamW's checkpoint Muon is worse" in line for line in said)
    assert [line for line in said if "Plain text" in line and "AdamW's checkpoint" in line] == []
    fine_tuning.draw(found, tmp_path / "pairs.png")
