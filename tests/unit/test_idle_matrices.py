"""A matrix whose gradient is exactly zero: an expert without tokens."""

import pytest
import torch
from torch import nn

import lightning_muon as lm


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Parameter(torch.randn(3, 8, 6))
        self.alone = nn.ParameterList(nn.Parameter(matrix.clone()) for matrix in self.experts.detach())

    def give_gradients(self, step, idle):
        generator = torch.Generator().manual_seed(step)
        self.experts.grad = torch.randn(3, 8, 6, generator=generator)
        for expert, param in enumerate(self.alone):
            if expert in idle:
                self.experts.grad[expert] = 0
            param.grad = None if expert in idle else self.experts.grad[expert].clone()


IDLE = [(), (1,), (1, 2), (), (0,)]


def test_experts_in_a_stack_fare_like_modules_of_their_own():
    model = Experts()
    optimizer = lm.Muon(model, lr=0.1)
    for step, idle in enumerate(IDLE):
        model.give_gradients(step, idle)
        before = model.experts.detach().clone()
        optimizer.step()
        for expert, param in enumerate(model.alone):
            torch.testing.assert_close(model.experts[expert], param, rtol=1e-6, atol=1e-7)
            assert torch.equal(model.experts[expert], before[expert]) == (expert in idle)


def test_update_keeps_moving_along_the_stale_momentum_at_full_size():
    model = Experts()
    optimizer = lm.Muon(model, lr=0.1, weight_decay=0.0, idle_matrices="update")
    sizes = []
    for step in range(30):
        model.give_gradients(step, () if step == 0 else (1,))
        before = model.experts[1].detach().clone()
        optimizer.step()
        sizes.append((model.experts[1].detach() - before).square().mean().sqrt().item())
    assert sizes[-1] == pytest.approx(sizes[0], rel=0.05), "what the option is there to avoid"


def test_parts_of_a_fused_projection_are_matrices_of_their_own():
    fused = nn.Linear(6, 8, bias=False)
    groups = [{"params": [("fused", fused.weight)], "split_sizes": [5, 3], "algorithm": "muon"}]
    optimizer = lm.Muon(groups, lr=0.1)
    before = fused.weight.detach().clone()
    fused.weight.grad = torch.randn(8, 6)
    fused.weight.grad[5:] = 0
    optimizer.step()
    assert torch.equal(fused.weight[5:], before[5:])
    assert not torch.equal(fused.weight[:5], before[:5])
    assert len(optimizer.update_records[0].keys) == 1


def test_unknown_policy():
    with pytest.raises(ValueError, match="idle_matrices"):
        lm.Muon(nn.Linear(2, 2), idle_matrices="freeze")
