"""What the experiments have in common keeps the rules that they are judged by."""

import itertools

from benchmarks.claims.description import Run
from benchmarks.claims.setting import GRIDS, MODEL, SEEDS, TUNING_SEEDS, Setting, interval
from benchmarks.claims.tuning import Rates
from examples.moe_lm.config import ModelConfig


def test_tuning_seeds_are_not_reported() -> None:
    assert not set(TUNING_SEEDS) & set(SEEDS)
    assert min(len(set(TUNING_SEEDS)), len(set(SEEDS))) >= 3


def test_grid_is_four_by_three_at_least_by_factors_of_two() -> None:
    grid = GRIDS["full"]
    assert (len(grid.lrs) >= 4, len(grid.adamw_lrs) >= 3) == (True, True)
    for values in (grid.lrs, grid.adamw_lrs):
        assert {high / low for low, high in itertools.pairwise(values)} == {2}


def test_reported_runs_differ_between_optimizers_in_what_they_must() -> None:
    muon, adamw = (Setting().reported(one, Rates(1e-2, 2e-2), SEEDS) for one in ("muon", "adamw"))
    for seed in SEEDS:
        assert {**muon[seed].__dict__, "optimizer": "adamw"} == adamw[seed].__dict__
        assert muon[seed].seed == seed


def test_model_is_as_the_page_says() -> None:
    config = ModelConfig(**MODEL)
    assert round(config.num_parameters().total / 1000) == 354
    assert (config.hidden_size, config.num_hidden_layers, config.first_k_dense_replace) == (64, 3, 1)
    assert Setting().tokens_per_step == 1024


def test_batch_is_that_of_every_run_but_of_those_with_one_of_their_own() -> None:
    setting, rates = Setting(batch_size=64), Rates(1e-2, None)
    assert setting.run("muon", rates, 1).batch_size * Run.seq_len == setting.tokens_per_step == 4096
    assert setting.run("muon", rates, 1, batch_size=4).batch_size == 4
    assert setting.reported("muon", rates, [1])[1].batch_size == 64


def test_last_step_is_measured_whatever_the_steps() -> None:
    assert [interval(steps, 10) for steps in (600, 3000, 10, 7, 1, 125, 96)] == [60, 300, 1, 1, 1, 5, 8]
    for steps in range(1, 200):
        assert steps % interval(steps, 20) == 0
        assert steps / interval(steps, 20) >= min(20, steps)
