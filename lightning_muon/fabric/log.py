"""The monitors' figures in a Fabric loop."""

from __future__ import annotations

from typing import Any

from lightning.fabric import Fabric
from torch.optim import Optimizer

from lightning_muon.monitoring import Request, collect
from lightning_muon.monitoring.collect import Mode
from lightning_muon.sharding.require import require_muon

__all__ = ["log_optimizer"]

_FAMILIES = ("update_rms", "weight_rms", "weight_spectral_norm", "weight_svd_entropy")


def log_optimizer(
    fabric_or_logger: Fabric | Any,
    optimizer: Optimizer,
    step: int,
    *,
    families: tuple[str, ...] = _FAMILIES,
    include: str | None = None,
    exclude: str | None = None,
    mode: Mode = "brief",
) -> dict[str, float]:
    """Log what the Trainer's monitors log. Call it after ``optimizer.step()``, on every process, when due::

        if step % 100 == 0:
            lm.log_optimizer(fabric, optimizer, step)

    Args:
        fabric_or_logger: A Fabric with loggers, or a logger with ``log_metrics``.
        optimizer: The optimizer, as ``fabric.setup`` returned it or bare.
        step: The step to log at.
        families: The measures; the spectral ones cost an eigenvalue decomposition per matrix.
        include: See ``lightning_muon.UpdateRMSMonitor``.
        exclude: See there.
        mode: See there.

    Returns:
        The values by key, on every process.

    Raises:
        TypeError: The optimizer is not ``lightning_muon.Muon``.
    """
    bare = getattr(optimizer, "optimizer", optimizer)  # Fabric wraps it
    values = collect([require_muon(bare, "log_optimizer")], [Request(families, include, exclude, mode)]).values
    if isinstance(fabric_or_logger, Fabric):
        fabric_or_logger.log_dict(values, step=step)
    else:
        fabric_or_logger.log_metrics(values, step=step)
    return values
