"""One AdamW step over the elements a process owns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_muon.owned import OwnedParameter
from lightning_muon.updates import adamw_

__all__ = ["step_adamw"]


def step_adamw(group: Mapping[str, Any], owned: Sequence[OwnedParameter]) -> None:
    """Update the owned elements of a group's parameters, all at once."""
    runs_of = [parameter.runs() for parameter in owned]
    steps = [parameter.state["step"] for parameter, runs in zip(owned, runs_of, strict=True) for _ in runs]
    runs = [run for runs in runs_of for run in runs]
    if not runs:
        return
    adamw_(
        [run.weight for run in runs],
        [run.gradient.to(run.weight.dtype) for run in runs],
        [{**run.state, "step": step} for run, step in zip(runs, steps, strict=True)],
        lr=group["lr"],
        betas=(group["momentum"], group["betas"][1]),  # schedulers that cycle β₁ change "momentum"
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        maximize=group["maximize"],
    )
    for parameter, own in zip(owned, runs_of, strict=True):
        parameter.state["step"] += 1.0
        parameter.write_back(own)
