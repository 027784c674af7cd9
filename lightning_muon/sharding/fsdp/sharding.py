"""Muon on parameters that are sharded already: what a strategy, or a loop of one's own, has to call."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from lightning_muon.muon import Muon
from lightning_muon.sharding.fsdp.missing import MissingFSDPGradients
from lightning_muon.sharding.fsdp.partition import ShardPartition
from lightning_muon.sharding.fsdp.shard_module import require_sharded

__all__ = ["shard_optimizer"]

_logger = logging.getLogger(__name__)


def shard_optimizer(
    optimizer: Muon,
    module: nn.Module,
    *,
    exchange_mb: float = 8.0,
    exchange_dtype: torch.dtype | None = None,
    missing: MissingFSDPGradients | None = None,
    group: dist.ProcessGroup | None = None,
    tell: Callable[[str], None] = _logger.info,
) -> None:
    """Have an optimizer bring together the matrices of parameters that are ``DTensor`` s.

    The strategies do this. Without Lightning every rank must call it, after ``fully_shard`` and before the first step.

    Args:
        optimizer: Made from the sharded module.
        module: The sharded module.
        exchange_mb: See ``FSDPOptions``.
        exchange_dtype: See there.
        missing: What watches for gradients that some ranks lack; by default nothing does, and every rank must use the
            same parameters.
        group: The process group of all ranks that hold something; ``None`` is the default one.
        tell: What to do with a sentence for the user, on every rank.

    Raises:
        ValueError: A parameter is not sharded, or held in a way that Muon cannot bring together; on every rank.
        RuntimeError: The ranks disagree, or the optimizer has stepped; on every rank.
    """
    require_sharded(module)
    missing = missing or MissingFSDPGradients(None, group)
    partition = ShardPartition(optimizer, module, missing, int(exchange_mb * 2**20), exchange_dtype, group)
    optimizer.shard(partition)
    state = f" {optimizer.local_state_bytes() / 2**20:.2f} MiB of optimizer state here."
    tell(f"{partition.describe()}{state} optimizer.explain() shows each parameter.")
