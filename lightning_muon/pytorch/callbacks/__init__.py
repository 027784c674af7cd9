"""Trainer callbacks that show, layer by layer, whether Muon is working."""

from lightning_muon.pytorch.callbacks.experts import ExpertLoadMonitor
from lightning_muon.pytorch.callbacks.monitors import (
    MomentumSpectrumMonitor,
    SpectrumMonitor,
    UpdateRMSMonitor,
    WeightNormMonitor,
)
from lightning_muon.pytorch.callbacks.qk_clip import QKClip

__all__ = [
    "ExpertLoadMonitor",
    "MomentumSpectrumMonitor",
    "QKClip",
    "SpectrumMonitor",
    "UpdateRMSMonitor",
    "WeightNormMonitor",
]
