"""Going on from torch's optimizers: what of their state Muon can keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_muon.checkpoint.errors import some
from lightning_muon.construction import CONSTRUCTION
from lightning_muon.muon import Muon
from lightning_muon.names import canonical_name

__all__ = ["take_over"]

Momentum = Literal["ema", "heavy_ball"]
SavedState = Mapping[str, Any] | tuple[Mapping[str, Any], Sequence[str]]

_HEADER = ("parameter", "shape", "route", "kept", "why")


@dataclass(frozen=True)
class _Entry:
    """What an optimizer had learnt of one parameter.

    Attributes:
        state: Its entries, under torch's names.
        momentum: μ of its group.
    """

    state: Mapping[str, Any]
    momentum: float | None


def take_over(optimizer: Optimizer, *saved: SavedState, momentum: Momentum = "ema") -> str:
    """Start ``lightning_muon.Muon`` with what other optimizers had learnt, as far as it means the same here.

    ::

        muon, adamw = checkpoint["optimizer_states"]  # of torch.optim.Muon and torch.optim.AdamW
        print(lm.take_over(optimizer, (muon, names_of_matrices), (adamw, names_of_the_rest)))

    Kept are: for a parameter of Muon's, a ``momentum_buffer``, or else AdamW's ``exp_avg``, which is an average of the
    gradient as well (with β₁ for μ); for a parameter of AdamW's, ``exp_avg``, ``exp_avg_sq`` and ``step`` (also as
    Moonlight's optimizer names them). What cannot be kept starts from zero. Hyper-parameters are those that
    ``optimizer`` has; load the weights by ``load_state_dict`` of the model. Under a sharded strategy every process
    calls this, after the optimizer is set up.

    Args:
        optimizer: A ``lightning_muon.Muon``, or what Lightning or Fabric has wrapped it in.
        saved: The ``state_dict()`` of each optimizer of the earlier run. Where it has no names of parameters (torch
            saves them if the optimizer was given ``named_parameters()``), the pair of it and those names, in the order
            in which that optimizer got the parameters.
        momentum: How a ``momentum_buffer`` was kept. ``"ema"``: M ← μM + (1-μ)G, as ``torch.optim.Muon`` and this
            library do; it is kept bit for bit. ``"heavy_ball"``: M ← μM + G, as in Moonlight's, dion's and the
            earlier versions of Keller Jordan's code, which is 1/(1-μ) times as much; it is multiplied by 1-μ, with
            the μ of the saved group or, if that names none, of this optimizer's.

    Returns:
        A table as text: for every parameter what was kept, and why.

    Raises:
        TypeError: ``optimizer`` is no ``lightning_muon.Muon``.
        ValueError: Names are missing, unknown, or given twice, or shapes differ. Nothing has been changed.
    """
    muon = _bare(optimizer)
    if momentum not in ("ema", "heavy_ball"):
        raise ValueError(f"momentum={momentum!r} is not known; choose 'ema' or 'heavy_ball'.")
    entries: dict[str, _Entry] = {}
    for source in saved:
        for name, entry in _entries(source):
            if name in entries:
                raise ValueError(f"Two of the saved states are of {name!r}; each parameter has one past.")
            entries[name] = entry
    _check(muon, entries)
    rows, groups = [_HEADER], []
    state: dict[int, dict[str, Any]] = {}
    for group in muon.param_groups:
        indices = []
        for name, param in zip(group["param_names"], group["params"], strict=True):
            kept, what, why = _keep(group, param, entries.get(name), momentum)
            indices.append(len(state))
            state[indices[-1]] = kept
            rows.append((name, str(tuple(param.shape)), group["algorithm"], what, why))
        groups.append({**group, "params": indices})
    muon.load_state_dict({"state": state, "param_groups": groups})
    return _table(rows)


def _bare(optimizer: Any) -> Muon:
    while hasattr(optimizer, "optimizer"):  # Lightning's and Fabric's wrappers pass for what they wrap
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Muon):
        raise TypeError(f"take_over() gives a state to lightning_muon.Muon, not to {type(optimizer).__name__}.")
    return optimizer


def _entries(source: SavedState) -> Iterator[tuple[str, _Entry]]:
    state_dict, names = source if isinstance(source, tuple) else (source, None)
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError("A saved state must be the state_dict() of an optimizer, with 'state' and 'param_groups'.")
    if CONSTRUCTION in state_dict:
        raise ValueError("This state was saved by lightning_muon.Muon: optimizer.load_state_dict() loads it.")
    members = [(index, group) for group in state_dict["param_groups"] for index in group["params"]]
    if names is None:
        names = _saved_names(state_dict["param_groups"])
    if isinstance(names, str) or len(names) != len(members):
        raise ValueError(
            f"A saved optimizer had {len(members)} parameters, and {len(names)} names were given for them. Give all, in"
            " the order in which that optimizer got the parameters."
        )
    for name, (index, group) in zip(names, members, strict=True):
        value = group.get("momentum")
        yield canonical_name(name), _Entry(state_dict["state"].get(index, {}), None if value is None else float(value))


def _saved_names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = [key for group in groups for key in group["params"]]
    if keys and all(isinstance(key, str) for key in keys):  # as FSDP's tools save it
        return keys
    if not all("param_names" in group for group in groups):
        raise ValueError(
            "A saved state has no names of parameters. Pass the pair (state_dict, names), with the names in the order"
            " in which that optimizer got the parameters: [name for name, _ in module.named_parameters()], say."
        )
    return [name for group in groups for name in group["param_names"]]


def _check(muon: Muon, entries: Mapping[str, _Entry]) -> None:
    params = dict(muon.named_parameters())
    unknown = sorted(set(entries) - set(params))
    if unknown:
        raise ValueError(
            f"The saved states are of parameters that this optimizer does not train: {some(unknown)}."
            f" It trains {some(sorted(params))}. Nothing has been changed."
        )
    faults = [
        f"{key} of {name!r} has shape {tuple(value.shape)}, the parameter {tuple(params[name].shape)}"
        for name, entry in entries.items()
        for key, value in entry.state.items()
        if isinstance(value, Tensor) and key != "step" and value.shape != params[name].shape
    ]
    if faults:
        raise ValueError(
            f"{some(faults)}: the names are in another order, or of another model. Nothing has been changed."
        )


def _keep(
    group: Mapping[str, Any], param: Tensor, entry: _Entry | None, momentum: Momentum
) -> tuple[dict[str, Any], str, str]:
    """The state of one parameter, what of it was kept, and why."""
    state = {} if entry is None else dict(entry.state)
    average = state.get("exp_avg", state.get("moment1"))
    square = state.get("exp_avg_sq", state.get("moment2"))
    nothing = torch.zeros((), device=param.device).expand(param.shape)
    if group["algorithm"] == "muon":
        if isinstance(buffer := state.get("momentum_buffer"), Tensor):
            if momentum == "ema":
                return {"momentum_buffer": buffer}, "momentum_buffer", "bit for bit"
            assert entry is not None
            factor = 1 - (group["momentum"] if entry.momentum is None else entry.momentum)
            return {"momentum_buffer": buffer.float() * factor}, "momentum_buffer", f"times {factor:.3g}, as heavy ball"
        if isinstance(average, Tensor):
            return {"momentum_buffer": average}, "exp_avg", "starts the momentum: an average of the gradient, too"
        return {"momentum_buffer": nothing}, "nothing", _why_nothing(entry, "no momentum")
    if isinstance(average, Tensor) and isinstance(square, Tensor) and "step" in state:
        step = torch.tensor(float(state["step"]))
        kept = {"exp_avg": average, "exp_avg_sq": square, "step": step}
        return kept, "exp_avg, exp_avg_sq, step", f"bit for bit, {int(step):,} steps old"
    fresh = {"exp_avg": nothing, "exp_avg_sq": nothing, "step": torch.tensor(0.0)}
    return fresh, "nothing", _why_nothing(entry, "AdamW needs exp_avg, exp_avg_sq and step")


def _why_nothing(entry: _Entry | None, lack: str) -> str:
    if entry is None:
        return "in none of the saved states"
    if not entry.state:
        return "it had no state: no step yet"
    return f"{lack} in {', '.join(sorted(entry.state))}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    kept = sum(row[3] != "nothing" for row in rows[1:])
    return "\n".join([*lines, "", f"{kept} of {len(rows) - 1} parameters go on with what was learnt of them."])
