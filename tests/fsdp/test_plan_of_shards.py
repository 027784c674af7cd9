"""Who holds what, who owns what, what travels: against DTensor itself, and counted."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import lightning_muon as lm
from lightning_muon.matrices import MatrixLayout
from lightning_muon.orthogonalize import orthogonalization_flops, polynomial_sequence
from lightning_muon.sharding.fsdp import shards
from lightning_muon.sharding.fsdp.plan import plan_shards
from lightning_muon.sharding.fsdp.shards import held_indices, shard_of
from tests.distributed.test_injected import Injected
from tests.fsdp.layouts import adopt, fsdp, hsdp
from tests.processes import run_processes

PLACEMENTS = [
    ((4,), [Shard(0)], (5, 3)),
    ((4,), [Shard(0)], (2, 3)),
    ((4,), [Shard(1)], (3, 6, 2)),
    ((2, 2), [Replicate(), Shard(0)], (7, 2)),
    ((2, 2), [Shard(0), Shard(0)], (7, 2)),
    ((2, 2), [Shard(1), Shard(0)], (5, 9)),
    ((2, 2), [Shard(0), Shard(2)], (3, 2, 5)),
]


def held_by_this_rank(mesh_shape, placements, shape):
    mesh = init_device_mesh("cpu", mesh_shape)
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape).float()
    sharded = distribute_tensor(whole, mesh, placements)
    shard = shard_of(sharded)
    return shard.take(whole), sharded.to_local(), shard.numel


@pytest.mark.parametrize(("mesh_shape", "placements", "shape"), PLACEMENTS)
def test_a_shard_holds_what_dtensor_says(mesh_shape, placements, shape):
    for taken, local, numel in run_processes(4, held_by_this_rank, mesh_shape, placements, shape):
        assert torch.equal(taken, local)
        assert numel == local.numel()


def test_interleaved_shards():
    """What FSDP makes of 8 rows that tensor parallelism has split in two: each rank has adjacent rows."""
    held = [held_indices(8, [(2, data, 2), (2, tensor, 1)]) for data in (0, 1) for tensor in (0, 1)]
    assert held == [((0, 2),), ((4, 6),), ((2, 4),), ((6, 8),)]


@pytest.mark.parametrize(
    ("shape", "indices", "layout"),
    [
        ((9, 5), (((2, 6),), ((0, 5),)), MatrixLayout.create(1, 9, 5)),
        ((9, 5), (((2, 6),), ((1, 3),)), MatrixLayout.create(1, 9, 5, split_sizes=(4, 5))),
        ((9, 6), (((1, 8),), ((2, 5),)), MatrixLayout.create(1, 9, 6, num_heads=3, transposed=True)),
        ((4, 6, 5), (((1, 3),), ((0, 6),), ((0, 5),)), MatrixLayout.create(4, 6, 5)),
        ((4, 6, 5), (((0, 4),), ((2, 4),), ((0, 5),)), MatrixLayout.create(4, 6, 5)),
        ((4, 6, 5), (((0, 1), (3, 4)), ((0, 6),), ((1, 4),)), MatrixLayout.create(4, 6, 5, num_heads=2)),
        ((6, 4, 3), (((1, 4),), ((0, 4),), ((0, 3),)), MatrixLayout.create(1, 6, 12)),
        ((6, 4, 3), (((0, 6),), ((1, 3),), ((0, 3),)), MatrixLayout.create(2, 3, 12)),
        ((1, 7), (((0, 1),), ((3, 5),)), MatrixLayout.create(1, 1, 7)),
        ((7, 1), ((), ((0, 1),)), MatrixLayout.create(1, 7, 1)),
    ],
)
def test_parts_are_where_they_say(shape, indices, layout):
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape).float()
    shard = shards.Shard(shape, indices)
    held = shard.take(whole).contiguous()
    seen = torch.zeros_like(held).view(-1)
    matrices = layout.matrices(whole)
    for part in shard.parts("p", layout):
        (top, bottom), (left, right) = part.rows, part.cols
        assert part.shape == tuple(matrices[part.key[1]].shape)
        assert torch.equal(part.view(held.view(-1)), matrices[part.key[1]][top:bottom, left:right])
        part.view(seen).add_(1)
    assert torch.equal(seen, torch.ones_like(seen)), "each held element is in one part"


def test_columns_in_pieces_cannot_be_brought_together():
    shard = shards.Shard((6, 4, 3), (((0, 6),), ((0, 4),), ((1, 2),)))
    with pytest.raises(ValueError, match="columns"):
        shard.parts("conv", MatrixLayout.create(1, 6, 12))


def shapes_of_a_model():
    layers = {f"l{n}_{name}": shape for n in range(6) for name, shape in (("q", (64, 64)), ("up", (176, 64)))}
    return {**layers, "experts": (8, 48, 64), "vector": (129,)}


def plan_of(world_size, replicas, stage_bytes=1 << 14, hosts=None):
    model = Injected(shapes_of_a_model())
    optimizer = lm.Muon(model)
    size = world_size // replicas
    held = {
        name: [
            shards.Shard(
                tuple(p.shape),
                (held_indices(p.shape[0], [(size, rank % size, 1)]), *(((0, n),) for n in p.shape[1:])),
            )
            for rank in range(world_size)
        ]
        for name, p in optimizer.named_parameters()
    }
    return plan_shards(optimizer, held, hosts or ["host"] * world_size, stage_bytes), optimizer, held


@pytest.mark.parametrize(("world_size", "replicas"), [(1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (8, 1), (8, 2), (64, 8)])
def test_every_matrix_is_orthogonalised_once(world_size, replicas):
    plan, *_ = plan_of(world_size, replicas)
    sequence = polynomial_sequence("polar_express5")
    matrices = [(s[-2:], s[0] if len(s) == 3 else 1) for s in shapes_of_a_model().values() if len(s) > 1]
    expected = sum(count * orthogonalization_flops(*shape, sequence) for shape, count in matrices)
    assert sum(plan.loads.flops) == expected
    assert len(plan.keys) == sum(count for _, count in matrices) == len(set(plan.keys))
    assert len(plan.stages) > 1
    if world_size <= 4:
        assert max(plan.loads.flops) <= 1.15 * expected / world_size


@pytest.mark.parametrize(("world_size", "replicas"), [(2, 1), (3, 1), (4, 1), (4, 2), (8, 2), (64, 8)])
def test_what_travels_is_the_shard_and_back(world_size, replicas):
    plan, optimizer, held = plan_of(world_size, replicas)
    muon = [name for name in held if optimizer.routes[name].algorithm == "muon"]
    shard = sum(held[name][rank].numel for name in muon for rank in range(world_size)) / world_size
    sent = [plan.sent(rank, world_size) for rank in range(world_size)]
    assert sum(sent) / world_size <= 2 * shard
    moves = [move for t in plan.transfers for way in (t.gathered, t.returned) for move in way]
    experts = [(source, target) for source, target, ((name, _), _, _) in moves if name == "experts"]
    if replicas == 1 and 8 % world_size == 0:
        assert all(source == target for source, target in experts), "an expert that a rank holds whole stays there"


def test_replicas_share_the_work_and_the_sending():
    plan, *_ = plan_of(8, 2)
    assert min(plan.loads.flops) > 0, "no rank repeats another's work, and none has nothing to do"
    assert min(plan.loads.sent) > 0


def test_owners_get_pieces_from_their_own_host():
    plan, *_ = plan_of(8, 2, hosts=["a"] * 4 + ["b"] * 4)
    crossing = [move for t in plan.transfers for move in t.gathered if move[0] // 4 != move[1] // 4]
    assert not crossing


def test_pieces_that_make_up_no_matrix():
    optimizer = lm.Muon(Injected({"w": (4, 4)}))
    held = {"w": [shards.Shard((4, 4), (((0, 3),), ((0, 4),)))]}
    with pytest.raises(ValueError, match="does not make up"):
        plan_shards(optimizer, held, ["host"], 1)


class _Counted:
    """Counts the elements that are handed to all-to-all, and the calls."""

    def __enter__(self):
        self.sent = self.calls = 0
        self.original = dist.all_to_all_single

        def counted(output, source, received, sent, **options):
            own = sent[dist.get_rank()]
            self.sent += (source.numel() - own) * source.element_size()
            self.calls += 1
            return self.original(output, source, received, sent, **options)

        dist.all_to_all_single = counted
        return self

    def __exit__(self, *_):
        dist.all_to_all_single = self.original


def bytes_of_a_step(layout, dtype):
    shapes = shapes_of_a_model()
    model = Injected(shapes)
    layout(model)
    optimizer = lm.Muon(model)
    adopt(optimizer, model, exchange_dtype=dtype, exchange_mb=0.02)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with _Counted() as counted:
        optimizer.step()
    partition = optimizer.partition
    shown = optimizer.explain().splitlines()[-1]
    assert shown.startswith("muon_fsdp: 14 parameters in 1 units, sharded over"), shown
    planned = partition.plan.sent(partition.rank, partition.world_size)
    shard = sum(p.to_local().numel() for n, p in model.named_parameters() if n != "vector")
    return counted.sent, counted.calls, planned, shard, len(partition.plan.transfers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layout", "world_size"), [(fsdp, 2), (fsdp, 3), (fsdp, 4), (hsdp, 4)])
def test_bytes_of_a_real_step(layout, world_size, dtype):
    results = run_processes(world_size, bytes_of_a_step, layout, dtype)
    for sent, calls, planned, _, num_stages in results:
        assert sent == planned * dtype.itemsize
        assert calls <= 2 * num_stages
    sent_by_all = sum(sent for sent, *_ in results)
    shards_of_all = sum(shard for *_, shard, _ in results)
    assert sent_by_all <= 2 * shards_of_all * dtype.itemsize
    for sent, _, _, shard, _ in results:
        assert sent <= 1.1 * 2 * shard * dtype.itemsize


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 4)


def columns_in_pieces():
    model = Strange()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model.conv.weight = nn.Parameter(distribute_tensor(model.conv.weight.detach(), mesh, [Shard(2)]))
    model.conv.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"conv\.weight.*columns"):
        adopt(lm.Muon(model), model)


def ranks_disagree():
    model = Injected({"w": (4, 4), "v": (3,) if dist.get_rank() else (4,)})
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in ("w", "v"):
        local = model.get_parameter(name).detach()
        setattr(model, name, nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False)))
    with pytest.raises(RuntimeError, match="parameter 'v'"):
        adopt(lm.Muon(model), model)


def without_a_partition():
    model = Injected({"w": (4, 4)})
    fsdp(model)
    optimizer = lm.Muon(model)
    model.w.grad = torch.ones_like(model.w)
    for call in (optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match="muon_fsdp"):
            call()


@pytest.mark.parametrize("check", [columns_in_pieces, ranks_disagree, without_a_partition])
def test_errors(check):
    run_processes(2, check)
