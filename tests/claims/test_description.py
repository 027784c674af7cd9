"""A run is what it says: written and read, and told apart from every other."""

from dataclasses import fields, replace

import pytest

from benchmarks.claims.description import Run
from benchmarks.claims.run import find
from tests.claims.conftest import TINY, tiny_run

OTHER = {
    "optimizer": "adamw",
    "lr": 1.0,
    "adamw_lr": None,
    "steps": 7,
    "seed": 8,
    "model": {**TINY, "hidden_size": 32},
    "batch_size": 9,
    "seq_len": 10,
    "weight_decay": 0.0,
    "update_rms": 0.4,
    "scale_rule": "baseline",
    "orthogonalization": "keller5",
    "router_optimizer": "adamw",
    "clip_tau": 30.0,
    "watch_logits": True,
    "measure": ("updates",),
    "measure_every": 2,
    "start_from": "weights.ckpt",
    "keep_checkpoint": True,
    "files": None,
    "val_windows": 3,
}


def test_written_and_read() -> None:
    run = tiny_run(measure=("updates", "spectra"), clip_tau=30.0)
    assert Run.from_json(run.to_json()) == run
    assert Run.from_json(run.to_json()).key == run.key


def test_other_runs_are_all_tried() -> None:
    assert OTHER.keys() == {field.name for field in fields(Run)}


@pytest.mark.parametrize("name", OTHER)
def test_whatever_differs_makes_another_key(name: str) -> None:
    assert replace(tiny_run(), **{name: OTHER[name]}).key != tiny_run().key


def test_key_is_readable() -> None:
    assert tiny_run("adamw", steps=5).key.startswith("adamw-lr0.01-aux0.02-steps5-seed1-")
    assert tiny_run(adamw_lr=None).key.startswith("muon-lr0.01-steps4-seed1-")


@pytest.mark.parametrize(
    "wrong",
    [
        {"optimizer": "sgd"},
        {"steps": 0},
        {"measure": ("update",)},
        {"scale_rule": "spectral"},
        {"measure_every": -1},
        {"optimizer": "adamw", "update_rms": 0.4},
    ],
)
def test_what_no_run_can_have(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Run: "):
        replace(tiny_run(), **wrong)


def test_what_describes_no_run() -> None:
    with pytest.raises(ValueError, match="has no rate"):
        Run.from_json('{"optimizer": "muon", "rate": 1}')
    with pytest.raises(ValueError, match=r"describes no run: .*'lr'"):
        Run.from_json('{"optimizer": "muon"}')


def test_what_is_not_done_is_not_found(tmp_path) -> None:
    assert find(tiny_run(), tmp_path) is None
