"""The Muon optimizer for PyTorch Lightning and Fabric. Importing it registers its strategies' names."""

from lightning_muon._register import register as _register
from lightning_muon.attention import AttentionHeads, HeadRows, QKClipper, observe_attention
from lightning_muon.checkpoint.errors import CheckpointError
from lightning_muon.checkpoint.takeover import take_over
from lightning_muon.data import GlobalBatchLoader
from lightning_muon.experts import ExpertLoads
from lightning_muon.fabric.checkpoint_io import MuonCheckpointIO
from lightning_muon.fabric.log import log_optimizer
from lightning_muon.muon import Muon
from lightning_muon.orthogonalize import available_sequences, orthogonalize
from lightning_muon.pytorch import MuonFSDPStrategy, MuonZero1Strategy
from lightning_muon.pytorch.callbacks import (
    ExpertLoadMonitor,
    MomentumSpectrumMonitor,
    QKClip,
    SpectrumMonitor,
    UpdateRMSMonitor,
    WeightNormMonitor,
)
from lightning_muon.routing import Rule, mark
from lightning_muon.sharding.clipping import grad_norm

__version__ = "0.1.0.dev0"

__all__ = [
    "AttentionHeads",
    "CheckpointError",
    "ExpertLoadMonitor",
    "ExpertLoads",
    "GlobalBatchLoader",
    "HeadRows",
    "MomentumSpectrumMonitor",
    "Muon",
    "MuonCheckpointIO",
    "MuonFSDPStrategy",
    "MuonZero1Strategy",
    "QKClip",
    "QKClipper",
    "Rule",
    "SpectrumMonitor",
    "UpdateRMSMonitor",
    "WeightNormMonitor",
    "available_sequences",
    "grad_norm",
    "log_optimizer",
    "mark",
    "observe_attention",
    "orthogonalize",
    "take_over",
]

_register()
