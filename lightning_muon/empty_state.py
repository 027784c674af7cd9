"""The state of a parameter before its first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muon.local import local
from lightning_muon.partition import Range
from lightning_muon.updates import state_dtypes

__all__ = ["empty_state", "is_empty"]


def empty_state(param: nn.Parameter, algorithm: str, ranges: Sequence[Range], master_weights: bool) -> dict[str, Any]:
    """State of the owned elements: like the parameter if that is all of them (a ``DTensor`` laid out as it is), else
    flat, range after range.

    Args:
        param: The parameter.
        algorithm: `"muon"` or `"adamw"`.
        ranges: The owned elements, ascending; not empty.
        master_weights: Keep a float32 copy of 16-bit parameters.
    """
    own = param.detach()
    if ranges != [(0, local(own).numel())]:
        flat = own.reshape(-1)
        own = torch.cat([flat[start:stop] for start, stop in ranges])
    packed = torch.contiguous_format
    state: dict[str, Any] = {
        key: own.to(dtype, memory_format=packed, copy=True)
        if key == "master_weight"
        else torch.zeros_like(own, dtype=dtype, memory_format=packed)
        for key, dtype in state_dtypes(algorithm, param.dtype, master_weights).items()
    }
    if algorithm == "adamw":
        state["step"] = 0.0
    return state


def is_empty(state: Mapping[str, Any]) -> bool:
    """Whether nothing has been learnt in it yet."""
    learnt = (value for key, value in state.items() if key != "master_weight")
    return not any(bool(local(value).any()) if isinstance(value, Tensor) else value for value in learnt)
