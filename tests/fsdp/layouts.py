"""Ways to lay a model out over the processes, and what to do with the shards in a test."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_muon.sharding.fsdp import shard_optimizer

# The models are small: with the default, all their matrices would be one stage.
MANY_STAGES = {"exchange_mb": 0.002}


def fsdp(module, units=()):
    """All ranks share every parameter."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    return _shard(module, units, mesh)


def hsdp(module, units=()):
    """Two replicas, each shared by half of the ranks."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return _shard(module, units, mesh)


def tensor_parallel(module, units=(), plan=None):
    """Pairs of ranks split layers; the pairs share what is left."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    plan = plan or {"tall": ColwiseParallel(), "wide": RowwiseParallel()}
    parallelize_module(module, mesh["tensor"], plan)
    return _shard(module, units, mesh["data"])


def _shard(module, units, mesh):
    for name in units:
        fully_shard(module.get_submodule(name), mesh=mesh)
    return fully_shard(module, mesh=mesh)


def adopt(optimizer, module, **options):
    shard_optimizer(optimizer, module, **{**MANY_STAGES, **options})


def whole(tensor):
    """The full tensor, on every rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def shard_like(value, param):
    """A gradient for a parameter: each rank takes its part of the same tensor."""
    if not isinstance(param, DTensor):
        return value.clone()
    if all(isinstance(placement, (Shard, Replicate)) for placement in param.placements):
        return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
    raise NotImplementedError(param.placements)


def copies_agree(tensor):
    """Whether all ranks that hold the same piece hold the same bits."""
    if not isinstance(tensor, DTensor):
        return True
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            group = tensor.device_mesh.get_group(axis)
            first = tensor.to_local().detach().clone()
            dist.broadcast(first, dist.get_global_rank(group, 0), group=group)
            if not first.equal(tensor.to_local()):
                return False
    return True
