"""Muon on parameters that are sharded already: what a strategy, or a loop of one's own, has to call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
import torch.distributed as dist

from lightning_muon.muon import Muon
from lightning_muon.sharding.clipping import ClipScope
from lightning_muon.sharding.fsdp.partition import ShardPartition
from lightning_muon.sharding.missing import MissingGradients, MissingPolicy

__all__ = ["FSDPOptions", "shard_optimizer"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FSDPOptions:
    """What can be chosen about ``muon_fsdp``'s optimizer step.

    Attributes:
        exchange_mb: MiB that a rank sends to the owners of matrices at a time, in float32. Less leaves less memory in
            flight and starts earlier, more makes larger batches for the orthogonalisation.
        exchange_dtype: What matrices and updates travel as. ``None`` takes bfloat16 where the orthogonalisation runs in
            16 bits, as by default on CUDA, and float32 elsewhere.
        missing_gradients: A parameter got a gradient on some ranks only. ``"zero"`` averages with zeros, ``"skip"``
            leaves it alone in this step, ``"raise"`` is an error on every rank.
        clip_scope: What clipping by the norm clips: see ``lightning_muon.sharding.zero1.Zero1Options``.

    Raises:
        ValueError: A value out of range.
    """

    exchange_mb: float = 8.0
    exchange_dtype: torch.dtype | None = None
    missing_gradients: MissingPolicy = "zero"
    clip_scope: ClipScope = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.exchange_mb, (int, float)) or not 0 < self.exchange_mb < float("inf"):
            raise ValueError(f"exchange_mb={self.exchange_mb!r} must be a positive number of MiB.")
        if self.exchange_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"exchange_dtype={self.exchange_dtype!r} must be torch.float32, torch.bfloat16, or None.")
        for name, value, values in (
            ("missing_gradients", self.missing_gradients, get_args(MissingPolicy)),
            ("clip_scope", self.clip_scope, get_args(ClipScope)),
        ):
            if value not in values:
                raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, values))}.")


def shard_optimizer(
    optimizer: Muon,
    options: FSDPOptions | None = None,
    group: dist.ProcessGroup | None = None,
    missing: MissingGradients | None = None,
    tell: Callable[[str], None] = _logger.info,
) -> None:
    """Have an optimizer bring together the matrices of parameters that are ``DTensor`` s.

    Every rank must call it, after ``fully_shard`` and before the first step.

    Args:
        optimizer: Made from the sharded module.
        options: What can be chosen.
        group: The process group of all ranks that hold something; ``None`` is the default one.
        missing: What has watched the gradients; by default one that treats those that are missing as the options say.
        tell: What to do with a sentence for the user, on every rank.

    Raises:
        ValueError: A parameter is held in a way that Muon cannot bring together; on every rank.
        RuntimeError: The ranks disagree, or the optimizer has stepped; on every rank.
    """
    options = options or FSDPOptions()
    missing = missing or MissingGradients("zero", group)
    stage_bytes = int(options.exchange_mb * 2**20)
    partition = ShardPartition(optimizer, missing, stage_bytes, options.exchange_dtype, group)
    optimizer.shard(partition)
    tell(f"Muon: {partition.describe()}. optimizer.explain() shows each parameter.")
