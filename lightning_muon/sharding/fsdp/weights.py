"""The weights of a sharded module: whole, for a checkpoint that every strategy reads, and from such a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from lightning_muon.checkpoint.check import check_weights
from lightning_muon.local import local
from lightning_muon.sharding.fsdp.shard_module import drop_gathered
from lightning_muon.sharding.fsdp.shards import shard_of

__all__ = ["load_whole_weights", "sharded_weights", "whole_weights"]


def whole_weights(module: nn.Module) -> dict[str, Any]:
    """``module.state_dict()`` as one process would have it, in CPU memory: on rank 0, and empty on the others. Every
    rank must call it."""
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def sharded_weights(module: nn.Module) -> dict[str, Any]:
    """``module.state_dict()`` with the shards as they are in memory, under the user's own names."""
    drop_gathered(module)
    return get_model_state_dict(module)


@torch.no_grad()
def load_whole_weights(module: nn.Module, saved: Mapping[str, Any], strict: bool = True, source: str = "") -> None:
    """Load weights that every rank has whole; a rank copies its shards, and reads no more of a mapped file.

    Args:
        module: The sharded module.
        saved: Whole tensors by name.
        strict: The names must be the same.
        source: Where they come from, to name it in an error.

    Raises:
        CheckpointError: Names (with ``strict``) or shapes differ. Nothing has been changed.
    """
    held = sharded_weights(module)
    check_weights(saved, module, strict=strict, source=source)
    for name, value in held.items():
        if name in saved and isinstance(value, Tensor):
            local(value).copy_(shard_of(value).take(saved[name]))
        elif name in saved:
            module.load_state_dict({name: saved[name]}, strict=False)  # what a module keeps besides tensors
