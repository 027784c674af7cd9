"""The monitors' figures in a Fabric loop."""

from __future__ import annotations

from typing import Any

from lightning.fabric import Fabric
from torch.optim import Optimizer

from lightning_muon.monitoring import Mode, Request, collect
from lightning_muon.muon import Muon
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

    What is made of the momentum is known during the step alone, so the step has to be told, on every process: the
    families of ``lightning_muon.MomentumSpectrumMonitor`` need ``optimizer.watch_next_step`` before, with the names of
    the parameters whose singular values are wanted (``optimizer.routes`` are all; ``ns_residual`` needs no names)::

        is_due = step % 100 == 0
        if is_due:
            optimizer.watch_next_step(spectra=optimizer.routes)
        optimizer.step()
        if is_due:
            lm.log_optimizer(fabric, optimizer, step, families=("update_rms", "momentum_q50", "ns_fail_frac"))

    Of a step that was skipped because of gradients that are not finite, these families log nothing.

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
        ValueError: A family is unknown, or needs a step that was watched.
    """
    muon = require_muon(getattr(optimizer, "optimizer", optimizer), "log_optimizer")  # Fabric wraps it
    request = Request(families, include, exclude, mode)
    _check_watched(muon, request)
    values = collect([muon], [request]).values
    if isinstance(fabric_or_logger, Fabric):
        fabric_or_logger.log_dict(values, step=step)
    else:
        fabric_or_logger.log_metrics(values, step=step)
    return values


def _check_watched(optimizer: Muon, request: Request) -> None:
    if not request.is_watching or optimizer.watch.next is not None:  # a gradient scaler has left out the step
        return
    unseen = request.spectra_of(optimizer) - (optimizer.watch.last or frozenset())
    if optimizer.watch.last is None or unseen:
        which = f" of {', '.join(sorted(unseen)[:3])}{', …' if len(unseen) > 3 else ''}" if unseen else ""
        raise ValueError(
            f"log_optimizer(families={request.families}): nobody has watched the last step{which}. Call"
            " optimizer.watch_next_step(spectra=optimizer.routes), or with the names that you want, before"
            " optimizer.step(), on every process; or leave out the families of the momentum and of Newton–Schulz."
        )
