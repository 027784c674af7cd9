"""float32 copies of 16-bit parameters: nothing is lost to rounding, and who changes a parameter is not overruled."""

import pytest
import torch
from torch import nn

import lightning_muon as lm
from tests.references import relative_error


def model(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 9)).to(dtype)


def train(module, optimizer, steps, first=0):
    """The gradients are given, and are bfloat16 numbers, so that the dtype of the model does not change them."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for param in module.parameters():
            param.grad = torch.randn(param.shape, generator=generator).bfloat16().to(param.dtype)
        optimizer.step()


OPTIONS = {"lr": 1e-4, "orthogonalization_dtype": torch.float32}


def test_master_weights_are_the_weights_of_a_float32_run():
    exact = model().float()
    train(exact, lm.Muon(exact, **OPTIONS), 20)
    rounded = model()
    optimizer = lm.Muon(rounded, master_weights=True, **OPTIONS)
    train(rounded, optimizer, 20)
    for param, expected in zip(rounded.parameters(), exact.parameters(), strict=True):
        assert optimizer.state[param]["master_weight"].dtype == torch.float32
        torch.testing.assert_close(optimizer.state[param]["master_weight"], expected.detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(param.detach(), expected.detach().bfloat16())
    bare = model()
    train(bare, lm.Muon(bare, **OPTIONS), 20)
    start = model()[0].weight.detach().float()
    moved, should = (m[0].weight.detach().float() - start for m in (bare, exact))
    assert relative_error(moved, should) > 0.3, "such small steps are lost without master weights"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_parameters_need_none(dtype):
    optimizer = lm.Muon(model(dtype), master_weights=True)
    optimizer.state_dict()
    assert not any("master_weight" in state for state in optimizer.state.values())


def test_a_parameter_changed_from_outside_wins():
    module = model()
    optimizer = lm.Muon(module, master_weights=True, **OPTIONS)
    train(module, optimizer, 5)
    before = {param: state["master_weight"].clone() for param, state in optimizer.state.items()}
    with torch.no_grad():
        module[0].weight[:3] = 7.0
    train(module, optimizer, 1, first=5)
    assert (module[0].weight[:3] > 6.9).all()
    kept = optimizer.state[module[0].weight]["master_weight"][3:]
    assert relative_error(kept, before[module[0].weight][3:]) < 1e-2
    assert not torch.equal(kept, kept.bfloat16().float()), "what was left alone has kept its own digits"


def test_resumes_bitwise_and_across_the_option():
    whole = model()
    train(whole, lm.Muon(whole, master_weights=True, **OPTIONS), 10)
    first = model()
    optimizer = lm.Muon(first, master_weights=True, **OPTIONS)
    train(first, optimizer, 5)
    resumed = model()
    other = lm.Muon(resumed, master_weights=True, **OPTIONS)
    other.load_state_dict(optimizer.state_dict())  # in either order
    resumed.load_state_dict(first.state_dict())
    train(resumed, other, 5, first=5)
    for found, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)

    without = lm.Muon(model(), **OPTIONS)
    without.load_state_dict(optimizer.state_dict())
    assert not any("master_weight" in state for state in without.state.values())
    late = model()
    late.load_state_dict(first.state_dict())
    with_copies = lm.Muon(late, master_weights=True, **OPTIONS)
    with_copies.load_state_dict(without.state_dict())
    for param, state in with_copies.state.items():
        assert torch.equal(state["master_weight"], param.detach().float())


def test_strided_parameters():
    module = nn.Conv2d(3, 6, 3).to(torch.bfloat16).to(memory_format=torch.channels_last)
    plain = nn.Conv2d(3, 6, 3).to(torch.bfloat16)
    plain.load_state_dict(module.state_dict())
    for one in (module, plain):
        train(one, lm.Muon(one, master_weights=True, **OPTIONS), 5)
    assert torch.equal(module.weight, plain.weight)
