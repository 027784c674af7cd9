"""For ``lightning.pytorch.Trainer``: strategies and callbacks."""

from lightning_muon.pytorch.fsdp import MuonFSDPStrategy
from lightning_muon.pytorch.zero1 import MuonZero1Strategy

__all__ = ["MuonFSDPStrategy", "MuonZero1Strategy"]
