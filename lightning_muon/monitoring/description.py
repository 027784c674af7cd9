"""``muon_model.json`` beside a run's logs: what tools need to know of the model to read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_muon.logs import ModelDescription, ParameterDescription
from lightning_muon.monitoring.sources import Measured, measured_parameters
from lightning_muon.muon import Muon
from lightning_muon.orthogonalize import default_dtype

__all__ = ["describe_model", "log_folders"]


def describe_model(optimizers: Iterable[Optimizer], names: Mapping[Tensor, str]) -> ModelDescription:
    """What the optimizers train.

    Args:
        optimizers: All of the run.
        names: What to call a parameter, where that is not its name in its optimizer.
    """
    optimizers = list(optimizers)
    trained = {param for one in optimizers for group in one.param_groups for param in group["params"]}
    measured = [one for muon in optimizers if isinstance(muon, Muon) for one in measured_parameters(muon, names)]
    return ModelDescription(
        sum(param.numel() for param in trained),
        {one.name: _describe(one) for one in measured if one.group["algorithm"] == "muon"},
    )


def _describe(measured: Measured) -> ParameterDescription:
    shapes = Counter(measured.shapes)
    return ParameterDescription(
        tuple((rows, cols, count) for (rows, cols), count in shapes.items()),
        measured.group["orthogonalization"],
        str(_dtype(measured, max(shapes, key=min))).removeprefix("torch."),
    )


def _dtype(measured: Measured, shape: tuple[int, int]) -> torch.dtype:
    """Of the iteration on matrices of this shape."""
    given: torch.dtype | None = measured.group["orthogonalization_dtype"]
    momentum = torch.promote_types(measured.param.dtype, torch.float32)
    return given or default_dtype(torch.empty(1, dtype=momentum, device=measured.param.device).expand(shape))


def log_folders(loggers: Iterable[Any]) -> list[Path]:
    """The folders of these loggers on this machine, each once. For process 0: others may see other version numbers.

    Args:
        loggers: Of a Trainer, of Fabric, or anyone's; those that have no ``log_dir`` do not count.
    """
    folders = [folder for folder in map(_log_dir, loggers) if folder is not None and "://" not in folder]
    return [Path(folder) for folder in dict.fromkeys(folders)]


def _log_dir(logger: Any) -> str | None:
    log_dir = getattr(logger, "log_dir", None)
    if not isinstance(log_dir, str | Path):
        return None
    getattr(logger, "experiment", None)  # the CSV logger warns of a folder that is not empty when it begins
    return str(log_dir)
