"""The weights of a sharded module: whole, for a checkpoint that every strategy reads, and from such a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_muon.local import local
from lightning_muon.names import canonical_name
from lightning_muon.sharding.fsdp.shard_module import drop_gathered
from lightning_muon.sharding.fsdp.shards import shard_of

__all__ = ["load_whole_weights", "sharded_weights", "whole_weights"]


def whole_weights(module: nn.Module) -> dict[str, Any]:
    """``module.state_dict()`` as one process would have it, in CPU memory: on rank 0, and empty on the others. Every
    rank must call it."""
    whole, is_first = {}, dist.get_rank() == 0
    for name, value in sharded_weights(module).items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if is_first:
            whole[name] = full.detach().cpu().clone() if isinstance(full, Tensor) else full
    return whole


def sharded_weights(module: nn.Module) -> dict[str, Any]:
    """``module.state_dict()`` with the shards as they are in memory."""
    drop_gathered(module)
    return module.state_dict()


@torch.no_grad()
def load_whole_weights(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Load weights that every rank has whole; a rank copies its shards, and reads no more of a mapped file.

    Names may differ by what wrappers add, such as those of ``torch.compile``.

    Args:
        module: The sharded module.
        saved: Whole tensors by name, which ``check_weights`` has found to fit.
    """
    given = {canonical_name(name): value for name, value in saved.items()}
    for name, own in sharded_weights(module).items():
        value = given.get(canonical_name(name))
        if isinstance(own, Tensor) and isinstance(value, Tensor):
            local(own).copy_(shard_of(own).take(value))
        elif value is not None:
            module.load_state_dict({name: value}, strict=False)  # what a module keeps besides tensors
