"""orthogonalization="auto" on one process: what it looks at, what it chooses, and that nothing of it is lost."""

import copy
import io
import logging

import numpy as np
import pytest
import torch
from torch import nn

import lightning_muon as lm
from lightning_muon.orthogonalize import Auto, dispatch, noise_floor, orthogonalization_flops, polynomial_sequence
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
    assert "chosen in" not in optimizer.explain()
    with caplog.at_level(logging.INFO, "lightning_muon"):
        decaying_gradients(model, 0)
        optimizer.step()
    (record,) = [record for record in caplog.records if "auto" in record.message]
    assert "optimizer step 1" in record.message
    assert " steps (" in record.message
    text = optimizer.explain()
    assert "orthogonalization='auto', as chosen in optimizer step 1" in text
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
    assert "not looked at yet (1 matrix)" in optimizer.explain()
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


def test_the_quantile_leaves_out_no_more_than_its_share():
    sigma = torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 5e-3, 2e-3, 1e-4], dtype=torch.float64)
    schatten = sigma.pow(4).sum().item() ** 0.25
    for quantile, index in ((0.0, 9), (0.05, 9), (0.1, 8), (0.19, 8), (0.2, 7), (0.29, 7), (0.3, 6)):
        auto = Auto(quantile=quantile, most_steps=12)
        expected = auto.choose(sigma[index].item() / schatten, 0.0)
        assert auto.steps_for(sigma, (10, 10), torch.float64) == expected, quantile


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_floor_is_two_roundings_in_units_of_the_schatten_norm(dtype):
    auto, found, others = Auto(), [], {"one rounding": [], "of the Frobenius norm": []}
    for rank in (8, 16, 32, 64, 128, 256, 512):
        sigma = torch.ones(rank, dtype=torch.float64)
        sigma[-rank // 4 :] = 1e-12  # more than may be left out
        sigma /= sigma.norm()
        floor, schatten = noise_floor(rank, 4 * rank, dtype), sigma.pow(4).sum().item() ** 0.25
        found.append(auto.steps_for(sigma, (rank, 4 * rank), dtype))
        assert found[-1] == auto.choose(1e-12, 2 * floor / schatten)
        others["one rounding"].append(auto.choose(1e-12, floor / schatten))
        others["of the Frobenius norm"].append(auto.choose(1e-12, 2 * floor))
    assert all(other != found for other in others.values()), "this would not notice"


def test_the_floor_holds_for_those_that_took_more_as_well():
    assert Auto().choose(1e-9, floor=6e-3, current=8) == 4


def test_the_optimizer_passes_on_what_was_taken_so_far():
    """Whoever has something to spare, but not enough of it, keeps his steps."""
    auto = Auto(every=1)
    layer = nn.Linear(40, 40, bias=False)
    optimizer = lm.Muon(layer, lr=1e-3, momentum=0.0, nesterov=False, orthogonalization={"name": "auto", "every": 1})
    u, _ = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0)))

    def step(lowest):
        sigma = torch.ones(40)
        sigma[-8:] = lowest * 36**0.25  # so that it is about `lowest` of the Schatten norm
        layer.weight.grad = u * sigma
        optimizer.step()
        return optimizer.step_counts["weight"][0]

    taken = step(auto.reach(5) * 1.1)
    assert taken == 5
    assert step(auto.reach(4) * 1.2) == 5
    assert step(auto.reach(4) * 2.5) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_optimizer_knows_the_floor_of_its_precision(dtype):
    layer = nn.Linear(64, 64, bias=False)
    optimizer = lm.Muon(layer, orthogonalization="auto", orthogonalization_dtype=dtype)
    layer.weight.grad = torch.outer(torch.randn(64), torch.randn(64)) + 1e-9 * torch.randn(64, 64)
    optimizer.step()
    assert optimizer.step_counts["weight"] == [Auto().choose(0.0, 2 * noise_floor(64, 64, dtype))]
    assert optimizer.step_counts["weight"][0] < 8


def test_an_expert_that_rested_really_takes_all_steps():
    model, optimizer = auto_model()
    decaying_gradients(model, 0)
    model.experts.grad[2] = 0
    optimizer.step()
    for step in (1, 2):  # the second of them does not look
        decaying_gradients(model, step)
        if step == 1:
            model.experts.grad[2] = 0
        optimizer.step()
    used = {key: len(record.sequence.steps) for record in optimizer.update_records for key in record.keys}
    assert optimizer.step_counts["experts"][2] == 0
    assert used["experts", 2] == 8
    assert used["experts", 1] == optimizer.step_counts["experts"][1]


def test_matrices_of_different_precisions_are_not_batched_together():
    layers = nn.ModuleDict({"a": nn.Linear(24, 24, bias=False), "b": nn.Linear(24, 24, bias=False)})
    dtypes = {"a.weight": torch.float64, "b.weight": torch.bfloat16}
    groups = [
        {"params": [(name, param)], "orthogonalization_dtype": dtypes[name]}
        for name, param in layers.named_parameters()
    ]
    optimizer = lm.Muon(groups, lr=1.0, weight_decay=0.0, momentum=0.0)
    gradient = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    before = layers["a"].weight.detach().clone()
    for param in layers.parameters():
        param.grad = gradient.clone()
    optimizer.step()
    exact = lm.orthogonalize(gradient.double(), dtype=torch.float64)
    assert relative_error((before - layers["a"].weight.detach()) / (0.2 * 24**0.5), exact) < 1e-5


def test_the_keys_of_the_state_are_there_before_the_first_step():
    """Whoever loads into a fresh optimizer's state, as torch.distributed.checkpoint does, asks for what is there."""
    _, fresh = auto_model()
    model, trained = auto_model()
    train(trained, model, range(3))
    before, after = (optimizer.state_dict()["lightning_muon"] for optimizer in (fresh, trained))
    assert before.keys() == after.keys()
    shapes = [{name: len(counts) for name, counts in state["counts"].items()} for state in (before, after)]
    assert shapes[0] == shapes[1]
    assert fresh.step_counts == {}


def test_never_more_than_most_steps_after_resuming_with_fewer():
    model, optimizer = auto_model()
    train(optimizer, model, range(1))
    assert max(max(counts) for counts in optimizer.step_counts.values()) > 3
    fewer = {
        "orthogonalization": {"name": "auto", "every": EVERY, "most_steps": 3},
        "hyperparameters_on_load": "current",
    }
    resumed_model, resumed = auto_model(**fewer)
    resumed.load_state_dict(optimizer.state_dict())
    train(resumed, resumed_model, range(2, 3))
    assert all(len(record.sequence.steps) <= 3 for record in resumed.update_records)


def test_a_sequence_that_is_not_safe_here_is_found_out_before_anything_is_loaded(monkeypatch):
    cans = [(8.4703, -25.1081, 18.6293), (4.1828, -3.1087, 0.5806), (3.9619, -2.9541, 0.5630)]
    layers = [nn.Linear(130, 130, bias=False) for _ in range(2)]
    first, second = (lm.Muon(layer, orthogonalization=cans) for layer in layers)
    layers[0].weight.grad = torch.randn(130, 130)
    first.step()
    state = first.state_dict()
    second.state_dict()
    before = second.state[layers[1].weight]["momentum_buffer"].clone()
    monkeypatch.setattr(dispatch, "_has_fast_bfloat16", lambda: True)
    for load in (second.check_state_dict, second.load_state_dict, lambda _: second.step()):
        with pytest.raises(ValueError, match=r"rounding in torch\.bfloat16"):
            load(state)
    assert torch.equal(second.state[layers[1].weight]["momentum_buffer"], before)


def test_eigenvalues_that_do_not_converge_teach_nothing(monkeypatch, caplog):
    def fail(_):
        raise torch.linalg.LinAlgError

    model, optimizer = auto_model()
    monkeypatch.setattr("lightning_muon.choosing.relative_singular_values", fail)
    decaying_gradients(model, 0)
    optimizer.step()
    assert not any(count for counts in optimizer.step_counts.values() for count in counts)
    assert "did not converge" in caplog.text
