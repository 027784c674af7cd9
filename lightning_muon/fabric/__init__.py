"""For ``lightning.fabric.Fabric``: strategies."""

from lightning_muon.fabric.fsdp import MuonFSDPStrategy
from lightning_muon.fabric.zero1 import MuonZero1Strategy

__all__ = ["MuonFSDPStrategy", "MuonZero1Strategy"]
