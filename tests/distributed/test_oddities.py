"""What DistributedDataParallel can do besides, with the gradients of one process as the measure."""

import pytest
import torch
from torch import nn

import lightning_muon as lm
from tests.processes import run_processes
from tests.references import relative_error
from tests.sharding import ShardedTraining, Training


class Sometimes(nn.Module):
    """Uses ``first`` for even samples, ``second`` for odd ones, ``never`` for none."""

    def __init__(self, is_strided=False):
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Conv2d(3, 6, 3)
        self.first, self.second, self.never = (nn.Linear(6, 7) for _ in range(3))
        if is_strided:
            self.shared.to(memory_format=torch.channels_last)

    def forward(self, images, numbers, uses_branches):
        x = torch.tanh(self.shared(images).mean((-1, -2)))
        if not uses_branches:
            return (self.first(x) + self.second(x) + self.never(x)).square().sum()
        total = x.sum()
        for sample, number in zip(x, numbers.tolist(), strict=True):
            total = total + (self.first if number % 2 == 0 else self.second)(sample).square().sum()
        return total


def train(sharded, uses_branches, is_strided, accumulate_without_zero, ddp_options):
    model = Sometimes(is_strided)
    optimizer = lm.Muon(model, lr=0.02)
    training = ShardedTraining(model, optimizer, **ddp_options) if sharded else Training(model, optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        optimizer.zero_grad()
        for _ in range(2 if accumulate_without_zero else 1):
            images, numbers = torch.randn(4, 3, 5, 5, generator=generator), torch.arange(4)
            # with two ranks, rank 0 has the even samples: each rank misses a branch
            mine = slice(training.rank, None, training.world_size)
            loss = training(images[mine], numbers[mine], uses_branches) * training.world_size / 4
            training.backward(loss)
        optimizer.step()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("uses_branches", "is_strided", "accumulate_without_zero", "ddp_options"),
    [
        (True, False, False, {"find_unused_parameters": True}),
        (True, False, True, {"find_unused_parameters": True}),
        (False, False, False, {"static_graph": True}),
        (False, False, True, {"gradient_as_bucket_view": True}),
        (False, True, False, {}),
        (False, True, True, {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.0005}),
    ],
    ids=["unused", "unused, two backwards", "static graph", "bucket view, two backwards", "strided", "strided, views"],
)
def test_equals_one_process(world_size, uses_branches, is_strided, accumulate_without_zero, ddp_options):
    arguments = (uses_branches, is_strided, accumulate_without_zero, ddp_options)
    expected = train(False, *arguments)
    for result in run_processes(world_size, train, True, *arguments):
        for name, weight in expected.items():
            assert relative_error(result[name], weight) <= 1e-5, name
    if uses_branches:
        torch.testing.assert_close(expected["never.weight"], Sometimes().never.weight.detach(), rtol=0, atol=0)
