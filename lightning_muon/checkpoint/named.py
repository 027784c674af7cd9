"""An optimizer's state by parameter name, as a sharded checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["from_named", "to_named"]

NamedTensors = Mapping[str, Mapping[str, Tensor]]


def to_named(state_dict: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """``Muon.state_dict()`` in two: what is cut into pieces, and what is kept as it is.

    Args:
        state_dict: The canonical state, which numbers the parameters. Its entries are tensors, whole or DTensors.

    Returns:
        The entries by parameter name; and the rest of the state, with the groups.
    """
    names = {
        index: name
        for group in state_dict["param_groups"]
        for index, name in zip(group["params"], group["param_names"], strict=True)
    }
    tensors = {names[index]: dict(entries) for index, entries in state_dict["state"].items()}
    return tensors, {key: value for key, value in state_dict.items() if key != "state"}


def from_named(tensors: NamedTensors, rest: Mapping[str, Any]) -> dict[str, Any]:
    """What ``to_named`` took apart."""
    state = {
        index: dict(tensors.get(name, {}))
        for group in rest["param_groups"]
        for index, name in zip(group["params"], group["param_names"], strict=True)
    }
    return {**rest, "state": state}
