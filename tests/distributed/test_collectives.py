"""Uneven sums and gathers, in both ways: gloo's, and NCCL's (which gloo can do as well, only not as cheaply)."""

import pytest
import torch
import torch.distributed as dist

from lightning_muon.sharding import collectives
from lightning_muon.sharding.zero1 import Zero1Options
from tests.distributed.test_options import train_in_stages
from tests.processes import run_processes
from tests.references import relative_error

SIZES = {2: [(3, 5), (4, 0), (0, 2)], 3: [(1, 2, 3), (0, 7, 0)], 4: [(2, 2, 2, 2), (5, 0, 1, 0)]}


def contribution(rank, total, dtype):
    return torch.randn(total, generator=torch.Generator().manual_seed(rank)).to(dtype)


def exchange(sizes, dtype, is_gloo):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    original, collectives.is_gloo = collectives.is_gloo, lambda *_: is_gloo
    try:
        summed = collectives.sum_onto_owners(contribution(rank, sum(sizes), dtype), sizes).wait()
        own = contribution(10 + rank, sizes[rank], dtype)
        gathered = collectives.Gathering(own, sizes).wait()
    finally:
        collectives.is_gloo = original
    parts = torch.stack([contribution(other, sum(sizes), dtype).float() for other in range(world_size)])
    expected = parts.sum(0).split(list(sizes))[rank]
    if is_gloo:  # in float32, whatever is sent
        assert summed.dtype == torch.float32
        torch.testing.assert_close(summed, expected, rtol=1e-6, atol=1e-6)
    else:
        torch.testing.assert_close(summed, expected, rtol=3e-2 if dtype == torch.bfloat16 else 1e-6, atol=3e-2)
    assert all(torch.equal(part, contribution(10 + r, sizes[r], dtype)) for r, part in enumerate(gathered))


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_gloo", [True, False], ids=["gloo's way", "NCCL's way"])
def test_uneven_parts(world_size, dtype, is_gloo):
    for sizes in SIZES[world_size]:
        run_processes(world_size, exchange, sizes, dtype, is_gloo)


def train_in_nccls_way():
    original, collectives.is_gloo = collectives.is_gloo, lambda *_: False
    try:
        return train_in_stages(Zero1Options(gather_mb=0.0005))
    finally:
        collectives.is_gloo = original


@pytest.mark.parametrize("world_size", [2, 3])
def test_training_in_nccls_way(world_size):
    expected = run_processes(1, train_in_stages, Zero1Options())[0]
    for weights in run_processes(world_size, train_in_nccls_way):
        assert all(relative_error(weights[name], weight) <= 1e-6 for name, weight in expected.items())
