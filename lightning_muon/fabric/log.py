"""The monitors' figures in a Fabric loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning.fabric import Fabric
from lightning.fabric.utilities import rank_zero_warn
from torch import distributed
from torch.optim import Optimizer

from lightning_muon.fabric.loggers import Loggers
from lightning_muon.monitoring import Mode, ObservedOptimizer, Request, Session, Subject
from lightning_muon.monitoring.description import describe_model, log_folders
from lightning_muon.muon import Muon
from lightning_muon.sharding.require import require_muon

__all__ = ["log_optimizer"]

_FAMILIES = ("update_rms", "weight_rms", "weight_spectral_norm", "weight_svd_entropy")
# Where the model is described already, for each optimizer.
_described: WeakKeyDictionary[Muon, set[Path]] = WeakKeyDictionary()
_loggers = Loggers()
_sessions: WeakKeyDictionary[Subject, Session] = WeakKeyDictionary()


def log_optimizer(
    fabric_or_logger: Fabric | Any,
    optimizer: Optimizer | ObservedOptimizer,
    step: int,
    *,
    families: str | Sequence[str] = _FAMILIES,
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

    ``families=lm.MomentumSpectrumMonitor.families`` is all that ``lightning-muon advise`` and ``fit`` read. With one of
    the momentum's families, process 0 also writes what these need to know of the model, ``muon_model.json``, beside
    the logs of every logger that has a ``log_dir``, once: as if the optimizer trained all of the model.

    What is trouble in a measurement is a warning where it begins, as in a Trainer.

    Of a step that was skipped because of gradients that are not finite, these families log nothing.

    Args:
        fabric_or_logger: A Fabric with loggers, or a logger with ``log_metrics``. One that fails is said once.
        optimizer: The optimizer, as ``fabric.setup`` returned it or bare; another optimizer of torch as
            ``lightning_muon.monitoring.ObservedOptimizer(optimizer, module)``, told before each step that is logged by
            its ``watch_next_step()``.
        step: The step to log at.
        families: The measures, one or several; the spectral ones cost an eigenvalue decomposition per matrix.
        include: See ``lightning_muon.UpdateRMSMonitor``.
        exclude: See there.
        mode: See there.

    Returns:
        The values by key, on every process.

    Raises:
        TypeError: The optimizer is not ``lightning_muon.Muon``.
        ValueError: A family is unknown, or needs a step that was watched.
    """
    subject: Subject
    if isinstance(optimizer, ObservedOptimizer):
        subject = optimizer
    else:
        subject = require_muon(getattr(optimizer, "optimizer", optimizer), "log_optimizer")  # Fabric wraps it
    request = Request((families,) if isinstance(families, str) else tuple(families), include, exclude, mode)
    _check_watched(subject, request)
    loggers = fabric_or_logger.loggers if isinstance(fabric_or_logger, Fabric) else [fabric_or_logger]
    if isinstance(subject, Muon) and request.has_spectra and _is_process_0():
        _describe(subject, loggers, step)
    sighting = _sessions.setdefault(subject, Session()).look([subject], [request])
    values = sighting.collection.values
    for text in sighting.warnings:
        rank_zero_warn(text)
    for number, logger in enumerate(loggers):
        _loggers.attempt(f"{type(logger).__name__} {number}", step, logger.log_metrics, dict(values), step)
    return values


def _is_process_0() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _describe(optimizer: Muon, loggers: Sequence[Any], step: int) -> None:
    written = _described.setdefault(optimizer, set())
    for folder in log_folders(loggers):
        if folder not in written:
            written.add(folder)
            write = describe_model([optimizer], {}).write
            _loggers.attempt(f"The writer of muon_model.json in {folder}", step, write, folder)


def _check_watched(optimizer: Subject, request: Request) -> None:
    if isinstance(optimizer, ObservedOptimizer):
        if request.has_updates and not optimizer.is_watched:
            raise ValueError(
                f"log_optimizer(families={request.families}): nobody has watched the last step. Call watch_next_step()"
                " of the ObservedOptimizer before the optimizer's step, or leave out the families of the update."
            )
        return
    assert isinstance(optimizer, Muon)  # there is no other subject
    if not request.is_watching or optimizer.watch.next is not None:  # a gradient scaler has left out the step
        return
    if request.has_alignments and optimizer.watch.alignments is None:
        raise ValueError(
            f"log_optimizer(families={request.families}): the last step has not kept how gradient, momentum and update"
            " lie to each other. Call optimizer.watch_next_step(alignments=True) before"
            " optimizer.step(), on every process; or leave out the families of cosines."
        )
    unseen = request.spectra_of(optimizer) - (optimizer.watch.last or frozenset())
    if optimizer.watch.last is None or unseen:
        which = f" of {', '.join(sorted(unseen)[:3])}{', …' if len(unseen) > 3 else ''}" if unseen else ""
        only_some = " To log only the parameters that were watched, give include= or exclude= here."
        raise ValueError(
            f"log_optimizer(families={request.families}): nobody has watched the last step{which}. Call"
            " optimizer.watch_next_step(spectra=optimizer.routes), or with the names that you want, before"
            " optimizer.step(), on every process; or leave out the families of the momentum and of Newton–Schulz."
            + (only_some if optimizer.watch.last else "")
        )
