"""The canonical optimizer state: what one process would have saved, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_muon.local import local
from lightning_muon.partition import NamedState

__all__ = ["match", "pack", "unpack_"]

_KEYS = {"muon": frozenset({"momentum_buffer"}), "adamw": frozenset({"exp_avg", "exp_avg_sq", "step"})}


def pack(state_dict: dict[str, Any], params: Mapping[str, Tensor], consolidated: NamedState) -> dict[str, Any]:
    """torch's ``state_dict()`` with whole tensors, and ``step`` as the tensor that ``torch.optim.AdamW`` saves.

    Args:
        state_dict: What ``torch.optim.Optimizer.state_dict`` gave.
        params: The trained parameters by name.
        consolidated: The whole state, flat, by name; empty if the state in ``state_dict`` is whole.
    """
    state = {}
    for group in state_dict["param_groups"]:
        for index, name in zip(group["params"], group["param_names"], strict=True):
            entries = consolidated[name] if consolidated else state_dict["state"].get(index, {})
            shape = params[name].shape
            state[index] = {
                key: value.view(shape) if isinstance(value, Tensor) and key != "step" else torch.tensor(float(value))
                for key, value in entries.items()
            }
    return {**state_dict, "state": state}


def match(
    state_dict: Mapping[str, Any], param_groups: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Find every parameter's saved state by name, and check all of it before anything is changed.

    Args:
        state_dict: A canonical state.
        param_groups: The groups of the optimizer that loads it.

    Returns:
        The saved groups in the order of ``param_groups``, and the saved state by parameter name.

    Raises:
        ValueError: Names, groups, routes or shapes differ.
    """
    saved_groups = [dict(group) for group in state_dict["param_groups"]]
    if not all("param_names" in group for group in saved_groups):
        raise ValueError(
            "This optimizer state has no parameter names; it was not saved by lightning_muon.Muon. Load the weights"
            " alone, and take over what can be kept of it by lightning_muon.take_over."
        )
    saved = {
        name: (group, state_dict["state"].get(index, {}))
        for group in saved_groups
        for index, name in zip(group["params"], group["param_names"], strict=True)
    }
    names = [name for group in param_groups for name in group["param_names"]]
    missing, unexpected = sorted(set(names) - set(saved)), sorted(set(saved) - set(names))
    if missing or unexpected:
        raise ValueError(
            "This optimizer state is of another model, or other parameters were trained (some frozen or tied, say)."
            f" Trained now and not in it: {_some(missing)}. In it and not trained now: {_some(unexpected)}."
            " Build the model as the saved run did, or load the weights alone. The optimizer has not been changed."
        )
    moved = {
        name: (group["algorithm"], saved[name][0]["algorithm"])
        for group in param_groups
        for name in group["param_names"]
        if saved[name][0]["algorithm"] != group["algorithm"]
    }
    if moved:
        told = [f"{name} ({now} here, {before} there)" for name, (now, before) in moved.items()]
        raise ValueError(
            f"Routed otherwise than in the saved run: {_some(told)}. Give the rules of that run, or begin a new one"
            ' from its weights alone: module.load_state_dict(lm.MuonCheckpointIO().load_checkpoint(path)["state_dict"])'
            " before fit, and no ckpt_path. The optimizer has not been changed."
        )
    groups = []
    for group in param_groups:
        partner = saved[group["param_names"][0]][0]
        if set(partner["param_names"]) != set(group["param_names"]):
            raise ValueError(
                f"The saved parameter groups are put together differently: {group['name']!r} here holds"
                f" {_some(group['param_names'])}; {partner.get('name')!r} there {_some(partner['param_names'])}."
                " Give the groups of the saved run."
            )
        for name, param in zip(group["param_names"], group["params"], strict=True):
            _check_entries(name, param, group["algorithm"], saved[name][1])
        # an option that the saved run did not know keeps its value of today
        groups.append({**group, **partner, "params": group["params"], "param_names": group["param_names"]})
    for group in groups:
        group["params"] = list(range(len(group["params"])))
    return groups, {name: entries for name, (_, entries) in saved.items()}


def _check_entries(name: str, param: Tensor, algorithm: str, entries: Mapping[str, Any]) -> None:
    if set(entries) - {"master_weight"} != _KEYS[algorithm]:  # whoever has no use for those leaves them
        raise ValueError(f"The saved state of {name!r} has {sorted(entries)}; expected {sorted(_KEYS[algorithm])}.")
    for key, value in entries.items():
        if key != "step" and value.shape != param.shape:
            raise ValueError(
                f"The saved {key} of {name!r} has shape {tuple(value.shape)}, the parameter {tuple(param.shape)}:"
                " the state is of another model."
            )


def unpack_(state: dict[str, Any], saved: Mapping[str, Any], take: Callable[[Tensor], Tensor]) -> None:
    """Copy this process's part of a saved state into ``state``, in the dtype and on the device that it has there.

    Args:
        state: The state of a parameter.
        saved: The same, whole.
        take: Gives this process's elements, flat, of something whole of the parameter's shape.
    """
    for key, value in saved.items():
        if key == "step":
            if "step" in state:
                state["step"] = float(value)
        elif key in state:
            own = local(value).reshape(-1) if hasattr(value, "to_local") else take(value)
            local(state[key]).view(-1).copy_(own)


def _some(names: Sequence[str]) -> str:
    return ", ".join(list(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"
