"""Which optimizer is planned: the one the module itself would train with, or ``lightning_muon.Muon`` of it."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_muon.muon import Muon
from lightning_muon.planning.models import NamedParameters
from lightning_muon.routing import Rule
from lightning_muon.usage import UsageError

__all__ = ["optimizer_of"]

_OVERRIDE = " To plan lightning_muon.Muon(model) in its place, pass --muon '{}'."


def optimizer_of(model: nn.Module | NamedParameters, options: Mapping[str, Any] | None) -> tuple[Muon, str]:
    """The optimizer of a model, and in words where it comes from.

    Args:
        model: The model, or its parameters.
        options: Arguments of ``lightning_muon.Muon``; ``None`` asks a LightningModule's ``configure_optimizers``.
            ``rules`` is a list of mappings of ``lightning_muon.Rule``'s arguments.

    Raises:
        UsageError: The optimizer cannot be built.
    """
    if options is None and isinstance(model, LightningModule):
        own = _configured(model)
        if isinstance(own, Muon):
            return own, "configure_optimizers()"
        return _muon(model, {}), f"lightning_muon.Muon(model), as configure_optimizers() returns {type(own).__name__}"
    return _muon(model, options or {}), "lightning_muon.Muon(model)" if not options else "--muon"


def _muon(model: nn.Module | NamedParameters, options: Mapping[str, Any]) -> Muon:
    try:
        rules = [Rule(**rule) for rule in options.get("rules", ())]
        return Muon(model, **{**options, "rules": rules})
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{error}\nArguments of lightning_muon.Muon go into --muon, for example"
            """ --muon '{"rules": [{"pattern": "gate_up_proj", "split_sizes": [1408, 1408]}]}'."""
        ) from error


def _configured(module: LightningModule) -> Optimizer | None:
    try:
        with contextlib.redirect_stdout(sys.stderr), _quiet():
            # For learning-rate schedules, which ask how many steps there will be.
            module.trainer = Trainer(
                accelerator="cpu",
                devices=1,
                plugins=[LightningEnvironment()],  # inside a SLURM job too: one process
                max_steps=1000,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            returned = module.configure_optimizers()
    except Exception as error:
        raise UsageError(
            f"{type(module).__name__}.configure_optimizers() failed without a run: {type(error).__name__}: {error}."
            + _OVERRIDE
        ) from error
    optimizers = _optimizers_in(returned)
    if len(optimizers) > 1:
        raise UsageError(
            f"{type(module).__name__}.configure_optimizers() returns {len(optimizers)} optimizers, and a plan is of"
            " one." + _OVERRIDE
        )
    return optimizers[0] if optimizers else None


def _optimizers_in(returned: Any) -> list[Optimizer]:
    """The optimizers in any of the forms that ``configure_optimizers`` may return."""
    if isinstance(returned, Optimizer):
        return [returned]
    if isinstance(returned, Mapping):
        return _optimizers_in(returned.get("optimizer"))
    if isinstance(returned, (list, tuple)):
        return [optimizer for entry in returned for optimizer in _optimizers_in(entry)]
    return []


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the Trainer's greetings."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)
