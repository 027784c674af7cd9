"""What monitors write beside a run and tools read after it. Imports neither the optimizer nor Lightning."""

from lightning_muon.logs.layers import Layer, layers
from lightning_muon.logs.model import LogError, MissingDescriptionError, ModelDescription, ParameterDescription
from lightning_muon.logs.scalars import Series, are_one_training, find_runs, read_scalars

__all__ = [
    "Layer",
    "LogError",
    "MissingDescriptionError",
    "ModelDescription",
    "ParameterDescription",
    "Series",
    "are_one_training",
    "find_runs",
    "layers",
    "read_scalars",
]
