"""Scale rules: one step against the equation written out, matrix by matrix."""

import math

import pytest
import torch
from torch import Tensor

import lightning_muon as lm
from benchmarks.claims.scaled_model import ScaledMoELM, factor
from examples.moe_lm.optim import is_auxiliary
from tests.claims.conftest import TINY, tiny_run


def step(model: ScaledMoELM) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before, and gradients; the model has stepped."""
    generator = torch.Generator().manual_seed(3)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    gradients = {name: param.grad.clone() for name, param in model.named_parameters()}
    model.make_optimizer().step()
    return before, gradients


def updated(weight: Tensor, gradient: Tensor, lr: float, weight_decay: float, scale) -> Tensor:
    """``W - lr·(scale·O + λW)`` of each matrix; the first step's momentum is a multiple of the gradient."""
    if weight.ndim == 3:
        pairs = zip(weight, gradient, strict=True)
        return torch.stack([updated(w, g, lr, weight_decay, scale) for w, g in pairs])
    o = lm.orthogonalize(gradient, "keller5")
    return weight - lr * (scale(o) * o + weight_decay * weight)


RULES = {
    "target": ({"update_rms": 0.4}, lambda o: 0.4 * math.sqrt(max(o.shape))),
    "adjusted": ({}, lambda o: 0.2 * math.sqrt(max(o.shape))),
    "baseline": ({"scale_rule": "baseline"}, lambda o: 0.2 * math.sqrt(TINY["hidden_size"])),
    "update_norm": ({"scale_rule": "update_norm"}, lambda o: 0.2 / o.square().mean().sqrt().item()),
    "both": ({"scale_rule": "update_norm", "update_rms": 0.1}, lambda o: 0.1 / o.square().mean().sqrt().item()),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_the_equation(rule: str) -> None:
    fields, scale = RULES[rule]
    model = ScaledMoELM(tiny_run(orthogonalization="keller5", weight_decay=0.5, **fields))
    before, gradients = step(model)
    usual = ScaledMoELM(tiny_run(orthogonalization="keller5", weight_decay=0.5))
    usual.load_state_dict({**model.state_dict(), **before})
    step(usual)
    for (name, param), expected in zip(model.named_parameters(), usual.parameters(), strict=True):
        if not is_auxiliary(name, param):
            expected = updated(before[name], gradients[name], 1e-2, 0.5, scale)
        torch.testing.assert_close(param, expected, rtol=2e-5, atol=2e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_router_by_adamw_under_any_scale() -> None:
    run = tiny_run(update_rms=0.4, router_optimizer="adamw")
    optimizer = ScaledMoELM(run).make_optimizer()
    routes = {name: route.algorithm for name, route in optimizer.routes.items() if "mlp.gate.weight" in name}
    assert routes == {"model.layers.1.mlp.gate.weight": "adamw"}


def test_a_matrix_that_the_step_leaves_alone_stays() -> None:
    model = ScaledMoELM(tiny_run(scale_rule="update_norm", weight_decay=0.5))
    experts = model.model.layers[1].mlp.experts.up_proj
    before = experts.detach().clone()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    experts.grad[2] = 0
    model.make_optimizer().step()
    assert torch.equal(experts[2], before[2])
    assert not torch.equal(experts[1], before[1])


def test_factor() -> None:
    assert factor(tiny_run(update_rms=0.8), (3, 5), 16) == pytest.approx(4.0)
    assert factor(tiny_run(scale_rule="baseline"), (128, 64, 16), 16) == pytest.approx(0.5)  # a stack of 128
