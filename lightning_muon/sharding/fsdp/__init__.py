"""Muon where the parameters themselves are sharded: FSDP2, HSDP, tensor parallelism."""

from lightning_muon.sharding.fsdp.options import FSDPOptions
from lightning_muon.sharding.fsdp.sharding import shard_optimizer

__all__ = ["FSDPOptions", "shard_optimizer"]
