"""Trainer callbacks that show, layer by layer, whether Muon is working."""

from lightning_muon.pytorch.callbacks.monitors import SpectrumMonitor, UpdateRMSMonitor, WeightNormMonitor

__all__ = ["SpectrumMonitor", "UpdateRMSMonitor", "WeightNormMonitor"]
