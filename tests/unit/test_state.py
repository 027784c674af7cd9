"""The canonical state: saved, loaded, refused."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lightning_muon as lm
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
    loaded = lm.Muon(resumed, lr=0.7)
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
    rules = [lm.Rule("experts"), lm.Rule("conv.weight")]  # without the module, their types are not known
    backwards = lm.Muon(list(reversed(list(model.named_parameters()))), rules=rules)
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
    with pytest.raises(ValueError, match=r"of another model.*lacks.*besides"):
        optimizer.load_state_dict(wrong_names)
    narrow, wide = lm.Muon(Other(3)), lm.Muon(Other(4))
    with pytest.raises(ValueError, match=r"'square\.weight' has shape \(4, 4\), the parameter \(3, 3\)"):
        narrow.load_state_dict(wide.state_dict())
    rerouted = lm.Muon([{"params": model.named_parameters(), "algorithm": "adamw"}])
    with pytest.raises(ValueError, match=r"put together differently|trained by"):
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
    with pytest.raises(ValueError, match="was trained by muon and is now routed to adamw"):
        by_adamw.load_state_dict(by_muon.state_dict())
