"""Which runs each experiment asks for: on which seeds, at which rates and lengths; and what a diverged one leaves."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from itertools import product
from types import ModuleType

import pytest

from benchmarks.claims import (
    attention_logits,
    fine_tuning,
    loss_curves,
    scale_rule,
    scaling_law,
    steps_to_loss,
    svd_entropy,
    weight_decay,
)
from benchmarks.claims.description import Run
from benchmarks.claims.setting import GRIDS, TUNING_SEEDS
from benchmarks.claims.tuning import FINALISTS, USUAL_INIT
from tests.claims.recorded import BEST_ADAMW_LR, BEST_LR, SEEDS, WIDE_INIT, Recorded, loss

EXPERIMENTS = (
    steps_to_loss,
    loss_curves,
    scaling_law,
    scale_rule,
    weight_decay,
    svd_entropy,
    attention_logits,
    fine_tuning,
)
AT_USUAL_SCALE = (scale_rule, weight_decay, svd_entropy, attention_logits)
OPTIONS = {"widths": (32, 64, 96), "tune_up_to": 64, "shares": steps_to_loss.SHARES}


def done(experiment: ModuleType, loss_of: Callable[[Run], float] = loss, **options: object) -> tuple[Recorded, dict]:
    """An experiment, and its results as they come out of the file."""
    laboratory = Recorded(loss_of, **{**OPTIONS, **options})
    found = {"steps": laboratory.setting.steps, "seeds": list(SEEDS), **experiment.experiment(laboratory)}
    return laboratory, json.loads(json.dumps(found, allow_nan=False))


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda one: one.NAME)
def test_rates_are_tuned_on_a_seed_of_their_own_and_every_arm_has_every_seed(experiment: ModuleType) -> None:
    laboratory, found = done(experiment)
    assert laboratory.tuning
    assert {run.seed for run in laboratory.reported} == set(SEEDS)
    described = [
        json.dumps({**json.loads(run.to_json()), "seed": 0, "start_from": None}) for run in laboratory.reported
    ]
    assert all(described.count(one) % len(SEEDS) == 0 for one in described)
    assert experiment.tables(found)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda one: one.NAME)
def test_both_optimizers_search_the_same_grid(experiment: ModuleType) -> None:
    laboratory, _ = done(experiment)
    grid = GRIDS["full"]
    for optimizer in ("muon", "adamw"):
        tried = {
            (run.lr, run.adamw_lr, run.model["initializer_range"])
            for run in laboratory.tuning
            if run.optimizer == optimizer and run.adamw_lr is not None
        }
        scales = (USUAL_INIT,) if experiment in (*AT_USUAL_SCALE, fine_tuning) else grid.initializer_ranges
        assert set(product(grid.lrs, grid.adamw_lrs, scales)) <= tried


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda one: one.NAME)
def test_best_rates_of_both_optimizers_were_tried_on_every_tuning_seed(experiment: ModuleType) -> None:
    _, found = done(experiment)
    for name, tuned in found["tuning"].items():
        chosen = [
            one
            for one in tuned["tried"]
            if all(one[key] == tuned[key] for key in ("lr", "adamw_lr", "initializer_range"))
        ]
        assert [set(one["val_loss"]) for one in chosen] == [{str(seed) for seed in TUNING_SEEDS}], name
        assert sum(len(one["val_loss"]) == len(TUNING_SEEDS) for one in tuned["tried"]) >= FINALISTS


@pytest.mark.parametrize("experiment", AT_USUAL_SCALE, ids=lambda one: one.NAME)
def test_both_arms_begin_at_the_usual_scale_with_the_rates_that_are_best_there(experiment: ModuleType) -> None:
    laboratory, found = done(experiment)
    assert {run.model["initializer_range"] for run in laboratory.reported} == {USUAL_INIT}
    assert {run.adamw_lr for run in laboratory.reported} == {BEST_ADAMW_LR}
    for name in ("muon", "adamw"):
        assert (found["tuning"][name]["lr"], found["tuning"][name]["initializer_range"]) == (
            BEST_LR[name, USUAL_INIT],
            0.02,
        )
    for run in laboratory.reported:
        allowed = {BEST_LR[run.optimizer, USUAL_INIT]}
        if experiment is scale_rule and run.optimizer == "muon":
            allowed.add(BEST_LR["adamw", USUAL_INIT])
        if experiment is attention_logits:
            allowed |= {4 * rate for rate in allowed}
        assert run.lr in allowed


def test_steps_to_loss() -> None:
    laboratory, _ = done(steps_to_loss)
    assert {(run.optimizer, run.steps) for run in laboratory.tuning} == {("muon", 600), ("muon", 360), ("adamw", 600)}
    reported = {(run.optimizer, run.steps, run.adamw_lr is None) for run in laboratory.reported}
    shares = {("muon", steps, False) for steps in (240, 300, 330, 360, 390, 420, 480, 600)}
    assert reported == shares | {("adamw", 600, False), ("adamw", 600, True)}
    for run in laboratory.reported:
        assert (run.lr, run.model["initializer_range"]) == (BEST_LR[run.optimizer, WIDE_INIT], WIDE_INIT)
        assert run.weight_decay == 0.1


def test_shorter_runs_have_the_rates_of_the_claimed_share_and_the_full_one_its_own() -> None:
    def shorter_wants_more(run: Run) -> float:
        return loss(run) if run.optimizer == "adamw" or run.steps == 600 else loss(run) + 0.3 * (run.lr < 1.6e-2)

    laboratory, _ = done(steps_to_loss, shorter_wants_more)
    rates = {run.steps: run.lr for run in laboratory.reported if run.optimizer == "muon"}
    assert rates == {**dict.fromkeys((240, 300, 330, 360, 390, 420, 480), 1.6e-2), 600: 8e-3}


def test_scaling_law() -> None:
    laboratory, found = done(scaling_law)
    assert {run.model["hidden_size"] for run in laboratory.tuning} == {32, 64}
    assert {run.model["hidden_size"] for run in laboratory.reported} == {32, 64, 96}
    for width in (32, 64, 96):
        lengths = {run.steps for run in laboratory.asked if run.model["hidden_size"] == width}
        assert lengths == {scaling_law.num_steps(width, 600)}
    assert [size["is_tuned"] for size in found["sizes"]] == [True, True, False]


def test_scale_rule() -> None:
    laboratory, _ = done(scale_rule)
    table_8 = {
        (run.lr, run.update_rms)
        for run in laboratory.reported
        if run.orthogonalization == "polar_express5" and run.optimizer == "muon"
    }
    rates = (BEST_LR["muon", USUAL_INIT], BEST_LR["adamw", USUAL_INIT])
    assert table_8 == set(product(rates, (0.05, 0.1, 0.2, 0.4, 0.8)))
    table_1 = [run for run in laboratory.reported if run.orthogonalization == "keller5"]
    assert {run.scale_rule for run in table_1} == {"baseline", "update_norm", "adjusted"}
    assert {run.lr for run in table_1} == {BEST_LR["muon", USUAL_INIT]}
    assert {run.weight_decay for run in laboratory.asked} == {0.1}


def test_weight_decay() -> None:
    laboratory, _ = done(weight_decay)
    assert {run.weight_decay for run in laboratory.tuning} == {0.1}
    arms = {(run.optimizer, run.steps, run.weight_decay) for run in laboratory.reported}
    assert arms == {("muon", steps, decay) for steps in (600, 3000) for decay in (0.1, 0.0)}


def test_svd_entropy() -> None:
    laboratory, _ = done(svd_entropy)
    assert {(run.optimizer, run.steps, "spectra" in run.measure) for run in laboratory.reported} == {
        ("muon", 600, True), ("adamw", 600, True)
    }  # fmt: skip


def test_attention_logits() -> None:
    laboratory, _ = done(attention_logits)
    muon, adamw = BEST_LR["muon", USUAL_INIT], BEST_LR["adamw", USUAL_INIT]
    arms = {(run.optimizer, run.lr, run.clip_tau) for run in laboratory.reported}
    assert arms == {
        ("adamw", adamw, None), ("adamw", 4 * adamw, None), ("muon", muon, None), ("muon", 4 * muon, None),
        ("muon", 4 * muon, 10.0), ("muon", 4 * muon, 100.0),
    }  # fmt: skip
    assert all(run.watch_logits and run.measure_every == 30 for run in laboratory.reported)


def fine_tuning_loss(run: Run) -> float:
    """Every pair has rates of its own."""
    if run.start_from is None:
        return loss(run)
    best = {"muon": (2e-3, 4e-3), "adamw": (4e-3, 2e-3)}[run.optimizer]
    assert run.adamw_lr is not None
    away = abs(math.log2(run.lr / best[0])) + abs(math.log2(run.adamw_lr / best[1]))
    return 1 + 0.1 * away + 0.001 * run.seed


def test_fine_tuning() -> None:
    laboratory, found = done(fine_tuning, fine_tuning_loss)
    pretraining = [run for run in laboratory.asked if run.keep_checkpoint]
    assert {run.seed for run in pretraining} == {TUNING_SEEDS[0], *SEEDS}
    assert {(run.optimizer, run.lr, run.model["initializer_range"], run.steps) for run in pretraining} == {
        (name, BEST_LR[name, USUAL_INIT], USUAL_INIT, 1200) for name in ("muon", "adamw")
    }
    tried = {(run.lr, run.adamw_lr) for run in laboratory.tuning if run.start_from and run.optimizer == "muon"}
    assert set(product((1e-3, 2e-3, 4e-3), repeat=2)) < tried  # and grown, since the best of the rest was the last
    tuned = [run for run in laboratory.reported if run.start_from is not None]
    assert len(tuned) == 4 * len(SEEDS)
    assert {run.steps for run in tuned} == {150}
    keys = {str(laboratory.folder / run.key / "weights.ckpt"): run for run in pretraining}
    for run in tuned:
        assert (run.lr, run.adamw_lr) == {"muon": (2e-3, 4e-3), "adamw": (4e-3, 2e-3)}[run.optimizer]
        assert keys[str(run.start_from)].seed == run.seed
    assert all(keys[str(run.start_from)].seed == TUNING_SEEDS[0] for run in laboratory.tuning if run.start_from)
    assert {keys[str(run.start_from)].optimizer for run in tuned} == {"muon", "adamw"}
    assert not any(one["is_on_edge"] for one in found["fine_tuning_rates"].values())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda one: one.NAME)
def test_reported_run_that_diverges_leaves_something_to_report(experiment: ModuleType, optimizer: str) -> None:
    def with_one_gone(run: Run) -> float:
        usual = fine_tuning_loss if experiment is fine_tuning else loss
        return math.inf if run.seed == 2 and run.optimizer == optimizer else usual(run)

    _, found = done(experiment, with_one_gone)
    text = experiment.tables(found)
    if experiment is weight_decay and optimizer == "adamw":
        assert not found["diverged"]  # it has no such arm
        return
    assert "training diverged with seed 2; left out." in text


@pytest.mark.parametrize(
    ("seeds", "said"), [("1 101 100", "rates are tuned on 100 and 101, which cannot be reported"), ("1 2 1", "twice")]
)
def test_seeds_that_cannot_be_reported_are_refused(seeds: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fine_tuning.run(["--seeds", *seeds.split()])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("share", ["0", "1", "-0.5", "1.2", "half"])
def test_share_of_the_steps_is_between_none_and_all(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    steps_to_loss.add_options(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--shares", share])
    assert share in capsys.readouterr().err
