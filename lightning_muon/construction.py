"""What an optimizer was constructed as, kept with its state: nobody resumes by another recipe unawares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from torch import Tensor

from lightning_muon.matrices import MatrixLayout
from lightning_muon.orthogonalize import same_orthogonalization
from lightning_muon.routes import Route

__all__ = ["CONSTRUCTION", "HyperparametersOnLoad", "constructed_options", "describe", "settle"]

HyperparametersOnLoad = Literal["match", "saved", "current"]

CONSTRUCTION = "lightning_muon"  # the state_dict's key
_FORMAT = 1
_MOST_NAMED = 5
_COMMON = ("lr", "weight_decay", "maximize")
_OPTIONS = {
    "muon": (*_COMMON, "momentum", "nesterov", "scale", "orthogonalization", "orthogonalization_dtype"),
    "adamw": (*_COMMON, "betas", "eps"),
}
# what is kept under a second name, for schedulers
_ALIASES = {"lr": ("initial_lr",), "betas": ("momentum",)}


def constructed_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters that matter to a group's algorithm, before a scheduler touches them."""
    return {key: _plain(group[key]) for key in _OPTIONS[group["algorithm"]]}


def describe(constructed: Sequence[Mapping[str, Any]], routes: Mapping[str, Route]) -> dict[str, Any]:
    """What the state says about its optimizer; tuples, numbers and text, which safe unpickling takes.

    Args:
        constructed: `constructed_options` of each group.
        routes: The decision on every parameter, by name.
    """
    return {
        "format": _FORMAT,
        "constructed": [dict(options) for options in constructed],
        "matrices": {name: asdict(layout) for name, layout in _layouts(routes).items()},
    }


def settle(
    state_dict: Mapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]],
    constructed: Sequence[Mapping[str, Any]],
    routes: Mapping[str, Route],
    policy: HyperparametersOnLoad,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Compare what a state was saved by with what is to load it.

    Args:
        state_dict: The state, of the same parameters and routes. One of an earlier version, which says nothing about
            its optimizer, is taken as it is.
        param_groups: The groups of the optimizer that loads it.
        constructed: `constructed_options` of those.
        routes: Of their parameters.
        policy: See `Muon`.

    Returns:
        For each group the options that keep their present values, and what counts as its construction from now on.

    Raises:
        ValueError: They differ, and `policy` does not say what to do about it.
    """
    saved = state_dict.get(CONSTRUCTION)
    if saved is None:
        return [{} for _ in param_groups], [dict(options) for options in constructed]
    if saved["format"] != _FORMAT:
        raise ValueError("This optimizer state was saved by a later version of lightning_muon; update to load it.")
    _check_matrices(saved["matrices"], routes, policy)
    by_name = {
        name: options
        for group, options in zip(state_dict["param_groups"], saved["constructed"], strict=True)
        for name in group["param_names"]
    }
    kept, settled, faults = [], [], []
    for group, options in zip(param_groups, constructed, strict=True):
        before = by_name[group["param_names"][0]]
        differing = [key for key in options if key in before and not _agree(key, before[key], options[key])]
        faults += [f"{key}={before[key]!r} saved, {options[key]!r} now ({group['name']})" for key in differing]
        keys = [name for key in differing for name in (key, *_ALIASES.get(key, ()))]
        kept.append({key: group[key] for key in keys if key in group} if policy == "current" else {})
        settled.append({**options, **({} if policy == "current" else before)})
    if faults and policy == "match":
        raise ValueError(
            f"This optimizer state was trained with other hyper-parameters: {_some(faults)}. Construct Muon with"
            ' the saved ones, or say which ones count: Muon(..., hyperparameters_on_load="saved") goes on with those of'
            ' the checkpoint, as torch does, and "current" with those given now, but for what a learning-rate scheduler'
            " restores from the checkpoint itself. The optimizer has not been changed."
        )
    return kept, settled


def _check_matrices(
    saved: Mapping[str, Mapping[str, Any]], routes: Mapping[str, Route], policy: HyperparametersOnLoad
) -> None:
    if policy == "current":
        return
    faults = []
    for name, layout in _layouts(routes).items():
        before = MatrixLayout(**{**saved[name], "sizes": tuple(saved[name]["sizes"])}) if name in saved else layout
        if before != layout:
            faults.append(f"{name!r} as {_words(before)} saved, as {_words(layout)} now")
    if faults:
        raise ValueError(
            f"This optimizer state was trained with parameters read as other matrices: {_some(faults)}. Give the"
            " split_sizes, num_heads and transposed of the saved run; or, to go on with those given now,"
            ' Muon(..., hyperparameters_on_load="current"). The optimizer has not been changed.'
        )


def _layouts(routes: Mapping[str, Route]) -> dict[str, MatrixLayout]:
    return {
        name: route.layout for name, route in routes.items() if route.algorithm == "muon" and route.layout is not None
    }


def _words(layout: MatrixLayout) -> str:
    return layout.describe() + (" stored (in, out)" if layout.transposed else "")


def _agree(key: str, saved: Any, now: Any) -> bool:
    if _plain(saved) == now:
        return True
    try:
        return key == "orthogonalization" and same_orthogonalization(saved, now)
    except (TypeError, ValueError):  # of a later version
        return False


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return tuple(_plain(item) for item in value) if isinstance(value, (list, tuple)) else value


def _some(faults: Sequence[str]) -> str:
    more = f"; and {len(faults) - _MOST_NAMED} more" if len(faults) > _MOST_NAMED else ""
    return "; ".join(faults[:_MOST_NAMED]) + more
