"""orthogonalization="auto" on one process: what it looks at, what it chooses, and that nothing of it is lost."""

import copy
import io
import logging

import numpy as np
import pytest
import torch
from torch import nn

import lightning_muon as lm
from lightning_muon.orthogonalize import Auto, noise_floor, orthogonalization_flops, polynomial_sequence
from tests.distributed.test_auto import EVERY, SHAPES, auto_model, decaying_gradients
from tests.references import newton_schulz, relative_error


def test_the_fewest_steps_that_bring_the_quantile_into_the_band():
    auto = Auto(band=0.1)
    for sigma in np.geomspace(2e-5, 1, 200):
        steps = auto.choose(sigma, floor=0.0)
        assert 0.9 <= auto.sequence(steps)(sigma) <= 1.1
        if steps > 2:
            fewer = polynomial_sequence({"name": "polar_express", "steps": steps - 1, "lower": sigma * 0.97})
            assert fewer(sigma) < 0.91, "the best of fewer steps would have done"


@pytest.mark.parametrize("band", [0.05, 0.1, 0.2])
def test_everything_above_the_reach_ends_in_the_band(band):
    auto = Auto(band=band)
    for steps in range(2, 9):
        sequence = auto.sequence(steps)
        outputs = [sequence(s) for s in np.geomspace(auto.reach(steps), 1, 3001)]
        assert min(outputs) >= 1 - band
        assert max(outputs) <= 1 + band + 1e-9
        assert len(sequence.steps) == steps


def test_never_finer_than_the_noise():
    auto = Auto()
    assert auto.choose(1e-9, floor=0.0) == auto.most_steps
    assert auto.choose(1e-9, floor=6e-3) == 4
    assert auto.choose(0.5, floor=6e-3) == 2


def test_more_steps_at_once_and_fewer_only_with_something_to_spare():
    auto = Auto()
    limit = auto.reach(4)
    assert auto.choose(limit * 0.99, floor=0.0, current=4) == 5
    assert auto.choose(limit * 1.4, floor=0.0, current=5) == 5
    assert auto.choose(limit * 1.6, floor=0.0, current=5) == 4
    assert auto.choose(0.9, floor=0.0, current=8) == 2


def test_when_it_looks():
    assert [step for step in range(1, 401) if Auto(every=100).is_due(step)] == [
        1,
        2,
        4,
        8,
        16,
        32,
        64,
        100,
        200,
        300,
        400,
    ]
    assert [step for step in range(1, 10) if Auto(every=3).is_due(step)] == [1, 2, 3, 6, 9]


def fed_by(gradients, mu=0.95):
    """What is orthogonalised in the last of some steps."""
    momentum = torch.zeros_like(gradients[0])
    for gradient in gradients:
        momentum = mu * momentum + (1 - mu) * gradient
    return mu * momentum + (1 - mu) * gradients[-1]


def test_the_optimizer_chooses_what_the_spectrum_of_its_momentum_asks_for():
    model, optimizer = auto_model()
    steps = 4
    for step in range(steps):
        decaying_gradients(model, step)
        optimizer.step()
    auto = Auto(every=EVERY)
    for name, counts in optimizer.step_counts.items():
        shape = SHAPES[name]
        history = [decaying_gradients(auto_model()[0], step)[name] for step in range(steps)]
        matrices = fed_by(history).reshape(-1, *shape[-2:]).double()
        for number, matrix in enumerate(matrices):
            sigma = np.linalg.svd(matrix.numpy(), compute_uv=False)
            schatten = (sigma**4).sum() ** 0.25
            quantile = np.sort(sigma)[int(auto.quantile * len(sigma))] / schatten
            floor = 2 * noise_floor(*shape[-2:], torch.float32) * np.linalg.norm(sigma) / schatten
            fresh = auto.choose(quantile, floor)
            assert fresh <= counts[number] <= auto.choose(quantile / 1.5, floor), name
    assert len({count for counts in optimizer.step_counts.values() for count in counts}) > 2, "all the same"


def test_the_update_is_that_of_the_chosen_sequence():
    model, optimizer = auto_model(weight_decay=0.0)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    gradients = decaying_gradients(model, 0)
    optimizer.step()
    for name, (steps, *_) in optimizer.step_counts.items():
        if len(SHAPES[name]) != 2:
            continue
        sequence = Auto().sequence(steps)
        wide = gradients[name].double()
        wide = wide if wide.shape[0] <= wide.shape[1] else wide.T
        wide = wide / torch.linalg.svdvals(wide).pow(4).sum() ** 0.25 * (1 / sequence.safety)
        expected = newton_schulz(wide, sequence.steps, 1 / wide.norm().item())
        expected = expected if SHAPES[name][0] <= SHAPES[name][1] else expected.T
        update = (before[name] - dict(model.named_parameters())[name].detach()) / (
            0.02 * 0.2 * max(SHAPES[name]) ** 0.5
        )
        assert relative_error(update, expected) < 1e-4, name


def test_counts_are_logged_and_explained(caplog):
    model, optimizer = auto_model()
    assert "chosen by" not in optimizer.explain()
    with caplog.at_level(logging.INFO, "lightning_muon"):
        decaying_gradients(model, 0)
        optimizer.step()
    (record,) = [record for record in caplog.records if "auto" in record.message]
    assert "optimizer step 1" in record.message
    assert " steps (" in record.message
    text = optimizer.explain()
    assert "orthogonalization='auto', chosen by optimizer step 1" in text
    for name, counts in optimizer.step_counts.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {name} ")]
        assert all(f"{count} steps" in line for count in counts)


def train(optimizer, model, steps):
    for step in steps:
        decaying_gradients(model, step)
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("at", [1, 5, EVERY, EVERY + 3])
def test_resuming_is_bitwise(at):
    model, optimizer = auto_model()
    train(optimizer, model, range(at))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(optimizer, model, range(at, 3 * EVERY))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed_model, resumed = auto_model()
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.step_counts == {
        name: list(counts) for name, counts in saved["optimizer"]["lightning_muon"]["counts"].items()
    }
    found = train(resumed, resumed_model, range(at, 3 * EVERY))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert resumed.step_counts == optimizer.step_counts


def test_a_state_of_before_begins_anew():
    model, optimizer = auto_model()
    train(optimizer, model, range(3))
    state = optimizer.state_dict()
    del state["lightning_muon"]["counts"], state["lightning_muon"]["step"]
    resumed_model, resumed = auto_model()
    resumed.load_state_dict(state)
    assert not resumed.step_counts
    train(resumed, resumed_model, range(3, 4))
    assert resumed.step_counts.keys() == optimizer.step_counts.keys()


def test_a_copy_has_its_own_counts():
    model, optimizer = auto_model()
    train(optimizer, model, range(2))
    other_model, other = copy.deepcopy((model, optimizer))
    assert other.step_counts == optimizer.step_counts
    train(other, other_model, range(2, 2 * EVERY))
    assert other.step_counts is not optimizer.step_counts


def test_an_expert_that_rests_gets_all_steps_until_it_was_looked_at():
    model, optimizer = auto_model()
    decaying_gradients(model, 0)
    model.experts.grad[2] = 0
    optimizer.step()
    counts = optimizer.step_counts["experts"]
    assert counts[2] == 0
    assert all(counts[number] for number in (0, 1, 3, 4))
    assert "not looked at yet (1 matrices)" in optimizer.explain()
    train(optimizer, model, [1])  # step 2 looks again
    assert optimizer.step_counts["experts"][2] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_teaches_nothing(value):
    model, optimizer = auto_model(nonfinite="propagate")
    decaying_gradients(model, 0)
    model.square.grad[0, 0] = value
    optimizer.step()
    assert optimizer.step_counts["square"] == [0]
    assert optimizer.step_counts["wide"][0] > 0
    assert model.wide.isfinite().all()


def test_groups_may_differ():
    model = nn.ModuleDict({"a": nn.Linear(20, 20, bias=False), "b": nn.Linear(20, 20, bias=False)})
    named = dict(model.named_parameters())
    groups = [
        {"params": [("a.weight", named["a.weight"])], "orthogonalization": {"name": "auto", "band": 0.3}},
        {"params": [("b.weight", named["b.weight"])], "orthogonalization": "keller5"},
    ]
    optimizer = lm.Muon(groups, lr=0.01)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert list(optimizer.step_counts) == ["a.weight"]
    assert "{'name': 'auto', 'band': 0.3}" in optimizer.explain()


def test_it_saves_work_where_there_is_some_to_save():
    """Random momentum is nearly orthogonal: four steps do where five are the custom."""
    uniform = orthogonalization_flops(64, 80, polynomial_sequence("polar_express5"))
    layer = nn.Linear(80, 64, bias=False)
    optimizer = lm.Muon(layer, orthogonalization="auto")
    layer.weight.grad = torch.randn(64, 80, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    (steps,) = optimizer.step_counts["weight"]
    assert orthogonalization_flops(64, 80, Auto().sequence(steps)) < 0.85 * uniform
