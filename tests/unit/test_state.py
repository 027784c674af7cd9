"""The canonical state: saved, loaded, refused."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn

import lightning_muon as lm
from lightning_muon.construction import constructed_options
from tests.models import awkward_model, token_batches


def trained(steps=3, model=None, **options):
    model = model or awkward_model()
    optimizer = lm.Muon(model, **{"lr": 0.05, **options})
    for tokens in token_batches(steps, 4):
        optimizer.zero_grad()
        model.loss(tokens).backward()
        optimizer.step()
    return model, optimizer


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_bitwise(dtype):
    model, optimizer = trained(3, awkward_model().to(dtype))
    weights, state = copy.deepcopy(model.state_dict()), through_a_file(optimizer.state_dict())
    resumed = awkward_model(seed=5).to(dtype)
    resumed.load_state_dict(weights)
    loaded = lm.Muon(resumed, lr=0.7, hyperparameters_on_load="saved")
    loaded.load_state_dict(state)
    assert loaded.param_groups[0]["lr"] == 0.05
    assert loaded.state[resumed.square.weight]["momentum_buffer"].dtype == torch.float32
    for module, opt in ((model, optimizer), (resumed, loaded)):
        for tokens in token_batches(3, 4, seed=9):
            opt.zero_grad()
            module.loss(tokens).backward()
            opt.step()
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_is_complete_before_the_first_step():
    model = awkward_model()
    state = lm.Muon(model).state_dict()
    assert len(state["state"]) == len(list(model.parameters()))
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_adamw_part_is_what_torch_saves():
    _, optimizer = trained(3)
    state = optimizer.state_dict()
    group = state["param_groups"][1]
    entries = state["state"][group["params"][0]]
    assert set(entries) == {"exp_avg", "exp_avg_sq", "step"}
    assert torch.equal(entries["step"], torch.tensor(3.0))


def test_parameters_are_matched_by_name_not_by_place():
    model, optimizer = trained(3)
    # without the module, their types are not known, nor that a convolution's rows are its filters
    rules = [lm.Rule("experts"), lm.Rule("conv.weight")]
    pairs = list(reversed(list(model.named_parameters())))
    backwards = lm.Muon(pairs, lr=0.05, rules=rules, hyperparameters_on_load="current")
    backwards.load_state_dict(optimizer.state_dict())
    for param, entries in optimizer.state.items():
        for key, value in entries.items():
            other = backwards.state[param][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_like_the_original(duplicate):
    model, optimizer = trained(2)
    other_model, other = duplicate((model, optimizer))
    assert other.routes == optimizer.routes
    for module, opt in ((model, optimizer), (other_model, other)):
        opt.zero_grad()
        module.loss(token_batches(1, 4)[0]).backward()
        opt.step()
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_option_that_was_not_saved_keeps_todays_value():
    _, optimizer = trained(1)
    state = optimizer.state_dict()
    del state["lightning_muon"]  # as an earlier version saved it
    for group in state["param_groups"]:
        del group["weight_decay"]
    fresh = lm.Muon(awkward_model(), weight_decay=0.03)
    fresh.load_state_dict(state)
    assert [group["weight_decay"] for group in fresh.param_groups] == [0.03, 0.03]
    fresh.step()


class Other(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.square = nn.Linear(width, width)


def test_state_of_another_model_is_refused_and_nothing_changes():
    model, optimizer = trained(2)
    before = copy.deepcopy(optimizer.state_dict())
    wrong_names = lm.Muon(Other(21)).state_dict()
    with pytest.raises(ValueError, match=r"of another model.*Trained now and not in it.*In it and not trained"):
        optimizer.load_state_dict(wrong_names)
    narrow, wide = lm.Muon(Other(3)), lm.Muon(Other(4))
    with pytest.raises(ValueError, match=r"'square\.weight' has shape \(4, 4\), the parameter \(3, 3\)"):
        narrow.load_state_dict(wide.state_dict())
    rerouted = lm.Muon([{"params": model.named_parameters(), "algorithm": "adamw"}])
    with pytest.raises(ValueError, match=r"Routed otherwise.*adamw here, muon there"):
        rerouted.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="no parameter names"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    after = optimizer.state_dict()
    for index, entries in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in entries.items())


def test_same_route_other_algorithm_is_refused():
    module = Other(4)
    by_muon = lm.Muon([("square.weight", module.square.weight)])
    by_adamw = lm.Muon([{"params": [("square.weight", module.square.weight)], "algorithm": "adamw"}])
    with pytest.raises(
        ValueError,
        match=r"saved run: square\.weight \(adamw here, muon there\)\. Give the rules",
    ):
        by_adamw.load_state_dict(by_muon.state_dict())


def groups_of(optimizer):
    return [constructed_options(group) for group in optimizer.param_groups]  # those that matter to the algorithm


DIFFERENCES = {
    "lr": (0.05, 0.07),
    "adamw_lr": (0.05, 0.07),
    "weight_decay": (0.1, 0.0),
    "momentum": (0.95, 0.9),
    "nesterov": (True, False),
    "scale": ("match_rms_adamw", "original"),
    "orthogonalization": ("polar_express5", ((3.0, -4.0, 2.0),)),
    "orthogonalization_dtype": (None, torch.bfloat16),
    "betas": ((0.9, 0.95), (0.8, 0.95)),
    "eps": (1e-8, 1e-6),
    "maximize": (False, True),
}


@pytest.mark.parametrize("option", DIFFERENCES)
def test_other_hyper_parameters_are_refused_or_decided_upon(option):
    _, optimizer = trained(2)
    saved, now = DIFFERENCES[option]
    state = through_a_file(optimizer.state_dict())
    key = "lr" if option == "adamw_lr" else option
    different = {"lr": 0.05, option: now}

    strict = lm.Muon(awkward_model(seed=1), **different)
    before = groups_of(strict), copy.deepcopy(strict.state_dict()["state"])
    with pytest.raises(ValueError, match=rf"{key}={re.escape(repr(saved))} saved, {re.escape(repr(now))} now"):
        strict.load_state_dict(state)
    assert groups_of(strict) == before[0]
    for index, entries in strict.state_dict()["state"].items():
        assert all(torch.equal(value, before[1][index][name]) for name, value in entries.items())

    as_saved = lm.Muon(awkward_model(seed=1), hyperparameters_on_load="saved", **different)
    as_saved.load_state_dict(state)
    assert groups_of(as_saved) == groups_of(optimizer)
    lm.Muon(awkward_model(), lr=0.05).load_state_dict(as_saved.state_dict())  # it is that recipe's run now

    as_now = lm.Muon(awkward_model(seed=1), hyperparameters_on_load="current", **different)
    expected = groups_of(as_now)
    as_now.load_state_dict(state)
    assert groups_of(as_now) == expected
    strict.load_state_dict(as_now.state_dict())


def test_what_a_scheduler_has_changed_is_no_difference():
    _, optimizer = trained(2)
    for group in optimizer.param_groups:
        group["lr"] = 0.001
    state = through_a_file(optimizer.state_dict())
    resumed = lm.Muon(awkward_model(), lr=0.05)
    resumed.load_state_dict(state)
    assert {group["lr"] for group in resumed.param_groups} == {0.001}
    again = lm.Muon(awkward_model(), lr=0.05, weight_decay=0.2, hyperparameters_on_load="current")
    again.load_state_dict(resumed.state_dict())
    assert {(group["lr"], group["weight_decay"]) for group in again.param_groups} == {(0.001, 0.2)}


def test_a_learning_rate_of_now_takes_its_schedule_along():
    _, optimizer = trained(2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    now = lm.Muon(awkward_model(), lr=0.3, hyperparameters_on_load="current")
    torch.optim.lr_scheduler.ExponentialLR(now, 0.5)
    now.load_state_dict(optimizer.state_dict())
    assert {(group["lr"], group["initial_lr"]) for group in now.param_groups} == {(0.3, 0.3)}


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"split_sizes": (21, 42)}, r"'tall\.weight' as \(63, 21\) saved, as \(21, 21\), \(42, 21\) now"),
        ({"num_heads": 3}, r"'tall\.weight' as \(63, 21\) saved, as 3 x \(21, 21\) now"),
        ({"transposed": True}, r"'tall\.weight' as \(63, 21\) saved, as \(63, 21\) stored \(in, out\) now"),
    ],
)
def test_parameters_read_as_other_matrices_are_refused(rule, words):
    _, optimizer = trained(2)
    state = through_a_file(optimizer.state_dict())
    rules = [lm.Rule("tall", **rule)]
    for policy in ("match", "saved"):
        other = lm.Muon(awkward_model(), lr=0.05, rules=rules, hyperparameters_on_load=policy)
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(state)
        assert not other.state_dict()["state"][0]["momentum_buffer"].any()
    deliberate = lm.Muon(awkward_model(), lr=0.05, rules=rules, hyperparameters_on_load="current")
    deliberate.load_state_dict(state)
    lm.Muon(awkward_model(), lr=0.05, rules=rules).load_state_dict(deliberate.state_dict())


def test_groups_with_options_of_their_own_are_compared_each():
    def optimizer(lr, policy="match"):
        model = awkward_model()
        pairs = dict(model.named_parameters())
        first = [("square.weight", pairs["square.weight"])]
        second = [("tall.weight", pairs["tall.weight"])]
        groups = [{"params": first, "name": "first"}, {"params": second, "name": "second", "lr": lr}]
        return lm.Muon(groups, lr=0.1, hyperparameters_on_load=policy)

    state = optimizer(0.2).state_dict()
    with pytest.raises(ValueError, match=r"hyper-parameters: lr=0\.2 saved, 0\.3 now \(second\)\."):
        optimizer(0.3).load_state_dict(state)
    loaded = optimizer(0.3, "current")
    loaded.load_state_dict(state)
    assert [group["lr"] for group in loaded.param_groups] == [0.1, 0.3]


def test_unknown_policy_on_loading():
    with pytest.raises(ValueError, match="hyperparameters_on_load='ignore' is not known"):
        lm.Muon(awkward_model(), hyperparameters_on_load="ignore")
