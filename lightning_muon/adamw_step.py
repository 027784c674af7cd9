"""One AdamW step over the elements a process owns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_muon.owned import OwnedParameter
from lightning_muon.updates import adamw_

__all__ = ["step_adamw"]


def step_adamw(group: Mapping[str, Any], owned: Sequence[OwnedParameter]) -> None:
    """Update the owned elements of a group's parameters, all at once."""
    weights = []
    params, gradients, states = [], [], []
    for parameter in owned:
        weight, gradient = parameter.flat()
        weights.append(weight)
        for start, stop, offset in parameter.runs():
            params.append(weight[start:stop])
            gradients.append(gradient[start:stop])
            states.append(_run_of(parameter.state, offset, stop - start))
    if not params:
        return
    adamw_(
        params,
        gradients,
        states,
        lr=group["lr"],
        betas=(group["momentum"], group["betas"][1]),  # schedulers that cycle β₁ change "momentum"
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        maximize=group["maximize"],
    )
    for parameter, weight in zip(owned, weights, strict=True):
        parameter.state["step"] += 1.0
        parameter.write_back(weight)


def _run_of(state: Mapping[str, Any], offset: int, size: int) -> dict[str, Any]:
    return {
        key: value.view(-1)[offset : offset + size] if isinstance(value, Tensor) else value
        for key, value in state.items()
    }
