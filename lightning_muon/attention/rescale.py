"""Rows of weights are multiplied, wherever they and their float32 copies are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muon.local import local
from lightning_muon.muon import Muon
from lightning_muon.sharding.fsdp.shards import shard_of
from lightning_muon.updates import state_dtypes

__all__ = ["scale_rows_"]


@torch.no_grad()
def scale_rows_(factors: Mapping[nn.Parameter, Tensor], optimizers: Iterable[Optimizer]) -> None:
    """Multiply the first dimension of parameters, in place. Every process must call it with the same factors.

    Whoever holds a parameter, or a shard of it, multiplies what it holds: the same on all replicas, so nothing has to
    travel. A parameter with master weights has them multiplied on their owners, exactly, and is rounded from them;
    who owns nothing of it receives it, with the other weights of its stage.

    Args:
        factors: ``(rows,)`` float32 for each parameter; where one is 1, a row stays as it is to the last bit.
        optimizers: Those that train the parameters.
    """
    muons = [optimizer for optimizer in optimizers if isinstance(optimizer, Muon)]
    owners = {param: (muon, name) for muon in muons for name, param in muon.named_parameters()}
    for muon in muons:
        muon.synchronize()  # weights of the last step may be on their way
    changed: dict[Muon, list[str]] = {}
    for param, row_factors in factors.items():
        whole = row_factors.to(param.device).view(-1, *[1] * (param.ndim - 1)).expand(param.shape)
        if param in owners and _has_master(*owners[param], param):
            muon, name = owners[param]
            _scale_master_(muon, name, param, whole)
            changed.setdefault(muon, []).append(name)
        else:
            held = local(param)
            held.copy_(held.to(torch.promote_types(held.dtype, whole.dtype)) * shard_of(param).take(whole))
    for muon, names in changed.items():
        _publish(muon, names)


def _has_master(muon: Muon, name: str, param: nn.Parameter) -> bool:
    """Whether some process has a float32 copy; all agree."""
    kept = state_dtypes(muon.routes[name].algorithm, param.dtype, muon.master_weights)
    # before its first step, a process that shares with nobody has no state
    return "master_weight" in kept and (muon.partition.is_sharded or bool(muon.state.get(param)))


def _scale_master_(muon: Muon, name: str, param: nn.Parameter, whole: Tensor) -> None:
    """On this process's elements."""
    held = local(param)
    ranges = muon.local_ranges(name, param)
    if not ranges:
        return
    flat = held.reshape(-1)
    own = torch.cat([flat[start:stop] for start, stop in ranges])
    master = local(muon.state[param]["master_weight"]).view(-1)
    # as in a step: where the weight was set from outside since, its copy takes it over
    torch.where(own == master.to(own.dtype), master, own.to(master.dtype), out=master)
    master.mul_(muon.partition.take(name, whole))
    sizes = [stop - start for start, stop in ranges]
    for (start, stop), rounded in zip(ranges, torch.split(master.to(own.dtype), sizes), strict=True):
        flat[start:stop] = rounded
    if not held.is_contiguous():  # then `flat` is a copy
        held.copy_(flat.view_as(held))


def _publish(muon: Muon, names: Sequence[str]) -> None:
    every = [name for name, _ in muon.named_parameters()]
    for number, stage in enumerate(muon.partition.stages(every)):
        if not set(names).isdisjoint(stage):
            muon.partition.publish(number)
    muon.synchronize()
