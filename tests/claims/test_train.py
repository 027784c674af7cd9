"""A run trains, measures what it was asked for, and can be paired with another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.claims.run import Outcome, do, find, main
from benchmarks.claims.scaled_model import ScaledMoELM
from benchmarks.claims.train import Losses, train
from examples.moe_lm.model import MoELM
from tests.claims.conftest import TINY, tiny_run


def test_measures_what_was_asked_when_it_was_asked() -> None:
    run = tiny_run(steps=6, measure=("updates", "weights", "spectra"), measure_every=3, watch_logits=True)
    figures = train(run)
    assert 0 < figures["val_loss"] < 6
    assert 0 < figures["train_loss"] < 6
    assert figures["diverged"] is None
    outcome = Outcome(run, figures, Path())
    matrix = "model.layers.0.self_attn.q_proj.weight"
    for family in ("update_rms", "weight_rms", "weight_svd_entropy"):
        assert [step for step, _ in outcome.curve(f"muon/{family}/{matrix}")] == [3, 6]
        assert matrix in outcome.last(f"muon/{family}/")
    assert "model.layers.1.mlp.experts.up_proj.3" in outcome.last("muon/weight_svd_entropy/")
    assert "model.layers.0.self_attn.1" in outcome.last("attention/max_logit/")
    json.dumps(figures)


def test_training_loss_is_of_the_last_tenth() -> None:
    losses = Losses()
    losses.losses = [torch.tensor(float(number)) for number in range(25)]
    assert losses.end() == (22 + 23 + 24) / 3


def test_nothing_is_measured_unasked() -> None:
    assert train(tiny_run())["measured"] == {}


def test_validating_on_the_way_changes_nothing() -> None:
    unseen, seen = train(tiny_run(steps=6)), train(tiny_run(steps=6, measure=("loss",), measure_every=2))
    assert [step for step, _ in seen["measured"]["val/loss"]] == [2, 4, 6]
    assert seen["measured"]["val/loss"][-1][1] == seen["val_loss"] == unseen["val_loss"]
    assert seen["train_loss"] == unseen["train_loss"]


def test_the_last_step_alone_is_measured_by_default() -> None:
    measured = train(tiny_run("adamw", measure=("updates",)))["measured"]
    assert {step for points in measured.values() for step, _ in points} == {4}


def test_same_seed_same_start_and_text_whatever_the_optimizer_and_the_length() -> None:
    """With a rate that moves nothing, the same windows give the same losses."""
    still = {"lr": 1e-12, "adamw_lr": 1e-12, "model": {**TINY, "bias_update_rate": 0.0}}
    muon, adamw = (train(tiny_run(one, steps=1, **still)) for one in ("muon", "adamw"))
    longer, other = train(tiny_run("muon", steps=10, **still)), train(tiny_run("muon", steps=1, seed=2, **still))
    assert muon["train_loss"] == adamw["train_loss"]
    assert muon["val_loss"] == adamw["val_loss"] == pytest.approx(longer["val_loss"], abs=1e-6)
    assert muon["train_loss"] != longer["train_loss"]  # its last window is another one
    assert muon["train_loss"] != other["train_loss"]
    assert train(tiny_run("muon"))["val_loss"] == train(tiny_run("muon"))["val_loss"]


def test_shorter_run_sees_the_first_windows_of_the_longer() -> None:
    from examples.moe_lm.data import RandomWindows

    tokens = torch.zeros(100_000, dtype=torch.int16)
    whole = RandomWindows(tokens, 64, 16 * 600, seed=1).starts
    for steps in (8, 240, 360):
        assert torch.equal(RandomWindows(tokens, 64, 16 * steps, seed=1).starts, whole[: 16 * steps])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_gradients_are_clipped_at_one(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    make, loss_of = ScaledMoELM.make_optimizer, ScaledMoELM.training_step

    def watched(self: ScaledMoELM) -> torch.optim.Optimizer:
        def watch(one: torch.optim.Optimizer, *_: object) -> None:
            gradients = [p.grad for group in one.param_groups for p in group["params"] if p.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(gradients).item())

        found = make(self)
        found.register_step_post_hook(watch)  # Lightning computes the gradients in the step
        return found

    monkeypatch.setattr(ScaledMoELM, "make_optimizer", watched)
    monkeypatch.setattr(ScaledMoELM, "training_step", lambda self, *of: 1000 * loss_of(self, *of))
    train(tiny_run(optimizer))
    assert norms == pytest.approx([1.0] * 4, rel=1e-4)


def test_fine_tuning_clips_at_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr(
        "benchmarks.claims.train.train_on_conversations", lambda run, options, _: asked.update(options) or {}
    )
    train(tiny_run(start_from="some.ckpt"))
    assert asked["gradient_clip_val"] == 1.0


def test_diverged_run_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "benchmarks.claims.scaled_model.ScaledMoELM.training_step", lambda self, *_: self(_[0]).sum() * 1e38
    )
    figures = train(tiny_run())
    assert figures["val_loss"] is None
    assert figures["train_loss"] is None
    assert "not finite" in figures["diverged"]
    assert Outcome(tiny_run(), figures, Path()).val_loss == float("inf")


def test_training_that_ends_early_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: MoELM, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.trainer.should_stop = True
        return self(batch[:, :-1]).sum()

    monkeypatch.setattr("benchmarks.claims.scaled_model.ScaledMoELM.training_step", stop)
    with pytest.raises(RuntimeError, match="after step 1 of 4"):
        train(tiny_run())


def test_checkpoint_is_kept_and_can_be_loaded(tmp_path: Path) -> None:
    kept = do(tiny_run("adamw", keep_checkpoint=True), tmp_path / "kept", "cpu")
    loaded = MoELM.load_from_checkpoint(kept.checkpoint, weights_only=True)
    assert loaded.optimizer_name == "adamw"


def test_clipping_bites(tmp_path: Path) -> None:
    high = {"lr": 0.3, "steps": 6, "measure_every": 1, "clip_tau": 0.5}
    largest = Outcome(tiny_run(**high), train(tiny_run(**high)), tmp_path)
    key = "attention/clipped_heads/model.layers.1.self_attn"
    assert max(value for _, value in largest.curve(key)) > 0


def test_command_does_a_run_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run()
    folder = tmp_path / run.key
    folder.mkdir()
    (folder / "run.json").write_text(run.to_json())
    main([str(folder / "run.json")])
    outcome = find(run, tmp_path)
    assert outcome is not None
    assert f"{run.key}: loss {outcome.val_loss:.4f}" in capsys.readouterr().out
    written = (folder / "result.json").stat().st_mtime_ns
    main([str(folder / "run.json")])
    assert (folder / "result.json").stat().st_mtime_ns == written


def test_result_of_another_run_or_without_its_weights_is_none(tmp_path: Path) -> None:
    run = tiny_run(keep_checkpoint=True)
    outcome = do(run, tmp_path / run.key, "cpu")
    assert find(run, tmp_path) == outcome
    outcome.checkpoint.unlink()
    assert find(run, tmp_path) is None
    other = tiny_run(steps=5)
    (tmp_path / run.key).rename(tmp_path / other.key)
    assert find(other, tmp_path) is None
