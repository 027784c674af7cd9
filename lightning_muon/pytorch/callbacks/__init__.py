"""Trainer callbacks that show, layer by layer, whether Muon is working."""

from lightning_muon.pytorch.callbacks.monitors import (
    MomentumSpectrumMonitor,
    SpectrumMonitor,
    UpdateRMSMonitor,
    WeightNormMonitor,
)

__all__ = ["MomentumSpectrumMonitor", "SpectrumMonitor", "UpdateRMSMonitor", "WeightNormMonitor"]
