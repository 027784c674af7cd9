"""The reduce-scatter over gloo that sends what is needed: torch's sums, fewer bytes."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from benchmarks.fsdp_memory import Held
from lightning_muon.sharding.fsdp import reduce_scatter
from lightning_muon.sharding.fsdp.fully_sharded import FullySharded
from lightning_muon.sharding.fsdp.options import FSDPOptions
from lightning_muon.sharding.fsdp.reduce_scatter import PairwiseReduceScatter, reduce_scatter_pairwise
from tests.processes import run_processes
from tests.references import relative_error

pytestmark = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_custom_reduce_scatter"), reason="this torch has no choice of reduce-scatter"
)


def reduce(size, dtype, op, message_bytes):
    """Ours, ours again, and torch's."""
    world_size = dist.get_world_size()
    generator = torch.Generator().manual_seed(dist.get_rank())
    values = torch.randn(world_size * size, generator=generator).to(dtype)
    usual, reduce_scatter._BYTES = reduce_scatter._BYTES, message_bytes
    results = []
    for function in (PairwiseReduceScatter(), PairwiseReduceScatter(), dist.reduce_scatter_tensor):
        output = torch.empty(size, dtype=dtype)
        assert function(output, values.clone(), group=dist.group.WORLD, op=getattr(dist.ReduceOp, op)) is None
        results.append(output)
    reduce_scatter._BYTES = usual
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("size", "op", "message_bytes"),
    [(1000, "SUM", 1 << 20), (1000, "AVG", 256), (7, "AVG", 4), (1, "SUM", 4), (1000, "MAX", 256)],
)
def test_equals_torch(world_size, size, op, message_bytes):
    for ours, again, torchs in run_processes(world_size, reduce, size, torch.float32, op, message_bytes):
        assert torch.equal(ours, again)
        assert torch.allclose(ours, torchs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_rounded_once(dtype):
    generators = [torch.Generator().manual_seed(rank) for rank in range(3)]
    values = [torch.randn(300, generator=generator).to(dtype) for generator in generators]
    exact = torch.stack(values).to(torch.promote_types(dtype, torch.float32)).sum(dim=0)
    for rank, (ours, *_) in enumerate(run_processes(3, reduce, 100, dtype, "SUM", 128)):
        assert torch.equal(ours, exact[100 * rank : 100 * rank + 100].to(dtype))


def bytes_in_flight(size):
    values, output = torch.ones(dist.get_world_size() * size), torch.empty(size)
    usual, reduce_scatter._BYTES = reduce_scatter._BYTES, 1 << 10
    with Held() as held:
        values.add_(1)
        output.zero_()
        held.phase = "reduce"
        PairwiseReduceScatter()(output, values, dist.group.WORLD, dist.ReduceOp.AVG)
    reduce_scatter._BYTES = usual
    return held.peaks["reduce"] - 4 * (values.numel() + size)


@pytest.mark.parametrize("world_size", [2, 4])
def test_holds_as_much_however_much_is_reduced_by_however_many(world_size):
    for extra in run_processes(world_size, bytes_in_flight, 10_000):
        # four of eighty messages, sent and received, and as much that gloo's threads may be about to drop
        assert extra <= 2 * 4 * 2 * (1 << 10)


class Network(nn.Module):
    """Rows that no number of ranks divides, one row, and a vector."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(5, 7), nn.Linear(7, 3, bias=False), nn.Linear(3, 1)

    def forward(self, x):
        return self.last(self.second(self.first(x).tanh()))


def gradients(shape, policy, is_pairwise):
    module = copy.deepcopy(Network())
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for unit in (module.second, module):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    if is_pairwise:
        assert reduce_scatter_pairwise(module, mesh)
    for seed in range(2):  # the second accumulates onto the first
        generator = torch.Generator().manual_seed(10 * seed + dist.get_rank())
        module(torch.randn(4, 5, generator=generator)).square().mean().backward()
    return {name: param.grad.full_tensor() for name, param in module.named_parameters()}


@pytest.mark.parametrize(("shape", "world_size"), [((2,), 2), ((3,), 3), ((4,), 4), ((2, 2), 4)])
@pytest.mark.parametrize(
    ("policy", "tolerance"),
    [
        (MixedPrecisionPolicy(), 1e-6),
        (MixedPrecisionPolicy(torch.bfloat16, torch.float32), 1e-6),
        (MixedPrecisionPolicy(torch.bfloat16), 1e-2),
    ],
    ids=["float32", "reduced in float32", "reduced in bfloat16"],
)
def test_gradients_of_fsdp2(shape, world_size, policy, tolerance):
    ours = run_processes(world_size, gradients, shape, policy, True)
    torchs = run_processes(world_size, gradients, shape, policy, False)
    for mine, theirs in zip(ours, torchs, strict=True):
        for name, gradient in theirs.items():
            assert relative_error(mine[name].float(), gradient.float()) <= tolerance, name


def elements_of_a_strategy():
    """Elements that this rank hands to all-to-alls in one backward, and of a shard with its padding."""
    module = Network()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    FullySharded("muon_fsdp", FSDPOptions()).shard(module, mesh, "32-true")
    loss = module(torch.ones(2, 5)).sum()
    sent, original = [], dist.all_to_all_single

    def counted(output, values, *args, **kwargs):
        sent.append(values.numel())
        return original(output, values, *args, **kwargs)

    dist.all_to_all_single = counted
    try:
        loss.backward()
    finally:
        dist.all_to_all_single = original
    return sum(sent), sum(
        -(-param.shape[0] // dist.get_world_size()) * param[0].numel() for param in Network().parameters()
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_strategy_on_gloo_sends_each_gradient_once(world_size):
    for sent, padded_shard in run_processes(world_size, elements_of_a_strategy):
        assert sent == world_size * padded_shard  # of which one part stays


def installed_on(device_type, backend):
    class Mesh:
        ndim = 1

        def get_group(self, axis):
            raise AssertionError("another device's group is nobody's business")

    mesh = Mesh()
    mesh.device_type = device_type
    return reduce_scatter_pairwise(nn.Linear(1, 1), mesh)


def test_other_devices_keep_torchs():
    assert not installed_on("cuda", "nccl")
