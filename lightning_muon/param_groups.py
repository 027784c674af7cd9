"""From what a user passes as ``params`` to parameter groups of one algorithm each."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_muon.names import canonical_name
from lightning_muon.orthogonalize import check_range, nominal_sequence, plain
from lightning_muon.routes import Candidate, Route
from lightning_muon.routing import Rule, route
from lightning_muon.updates import update_scale

__all__ = ["Router", "as_param_groups", "check_options", "unique_name"]


def as_param_groups(params: nn.Module | Iterable[Any]) -> tuple[list[dict[str, Any]], nn.Module | None]:
    """Bring every accepted form of ``params`` to a list of groups, without routing.

    Args:
        params: A module, an iterable of ``(name, parameter)``, or groups whose ``"params"`` hold such pairs.

    Returns:
        The groups, and the module if one was given (its types inform the routing).

    Raises:
        ValueError: There is nothing to train.
    """
    if isinstance(params, nn.Module):
        return [{"params": list(params.named_parameters(remove_duplicate=False))}], params
    entries = list(params)
    if not entries:
        raise ValueError("Muon got an empty list of parameters.")
    if all(isinstance(entry, Mapping) for entry in entries):
        return [dict(entry) for entry in entries], None
    return [{"params": entries}], None


class Router:
    """Routes the parameters of a group, and remembers what it has seen.

    Args:
        rules: The user's rules.
        module: The module whose parameters are trained, if known.

    Attributes:
        routes: The decision on every trainable parameter, by name.
    """

    def __init__(self, rules: Sequence[Rule], module: nn.Module | None) -> None:
        self.rules = tuple(rules)
        self.routes: dict[str, Route] = {}
        self._names: set[str] = set()
        self._owners: dict[str, nn.Module] = {}
        self._parents: dict[str, nn.Module] = {}
        named = () if module is None else tuple(module.named_modules(remove_duplicate=False))
        modules = {canonical_name(prefix): one for prefix, one in named}  # of wrappers and what they wrap the latter
        for prefix, owner in named:
            place = canonical_name(prefix)
            for name, _ in owner.named_parameters(recurse=False):
                path = canonical_name(f"{prefix}.{name}" if prefix else name)
                self._owners[path], self._parents[path] = owner, modules[place.rpartition(".")[0]]

    def split(self, group: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Route]]:
        """Split a group into one for Muon and one for AdamW, as far as both are needed.

        Frozen parameters are left out; a tied parameter stays once, under its first name.

        Returns:
            The groups, and the decisions on their parameters, which are not yet in ``routes``.

        Raises:
            ValueError: A parameter that no rule covers, that is not real, or whose name is taken.
            TypeError: A parameter without a name.
        """
        routes: dict[str, Route] = {}
        members: dict[str, list[tuple[str, nn.Parameter]]] = {"muon": [], "adamw": []}
        for param, names in _names_of(group["params"]).items():
            self._names.update(names)
            if not param.requires_grad:
                continue
            if not param.is_floating_point():
                raise ValueError(f"{names[0]!r} is {param.dtype}; Muon trains real floating-point parameters.")
            if names[0] in routes or names[0] in self.routes:
                raise ValueError(f"Two parameters are named {names[0]!r}; names must tell them apart.")
            owners = tuple(self._owners[name] for name in names if name in self._owners)
            parents = tuple(self._parents[name] for name in names if name in self._parents)
            decision = route(Candidate(tuple(names), param, owners, parents), self.rules, group)
            routes[names[0]] = decision
            members[decision.algorithm].append((names[0], param))
        options = {key: value for key, value in group.items() if key not in ("params", *_ROUTING_OPTIONS)}
        name = options.pop("name", None)
        is_mixed = bool(members["muon"] and members["adamw"])
        groups = [
            {
                **options,
                "params": pairs,
                "algorithm": algorithm,
                "name": algorithm if name is None else f"{name}/{algorithm}" if is_mixed else name,
            }
            for algorithm, pairs in members.items()
            if pairs
        ]
        return groups, routes

    def check_rules(self) -> None:
        """Raise if a rule's pattern is in no parameter's name: a misspelt rule would otherwise be silent."""
        for rule in self.rules:
            if not rule.matches(self._names):
                some = sorted(self._names)[:20]
                raise ValueError(
                    f"The pattern of {rule} is in no parameter's name. There are:"
                    f" {', '.join(some)}{', …' if len(self._names) > len(some) else ''}"
                )


_ROUTING_OPTIONS = ("algorithm", "split_sizes", "num_heads", "transposed", "interleaved")


def unique_name(name: str, taken: Collection[str]) -> str:
    """``name``, or ``name2``, ``name3``, … if it is taken: LearningRateMonitor wants names that differ."""
    candidates = itertools.chain([name], (f"{name}{number}" for number in itertools.count(2)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _names_of(params: Any) -> dict[nn.Parameter, list[str]]:
    """Every parameter with all its names, first things first."""
    pairs = params.named_parameters(remove_duplicate=False) if isinstance(params, nn.Module) else params
    names: dict[nn.Parameter, list[str]] = {}
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(
                f"Muon needs the names of the parameters, to route them and to name their state; got {type(pair)}."
                " Pass the module itself, or module.named_parameters() in place of module.parameters()."
            )
        names.setdefault(pair[1], []).append(canonical_name(pair[0]))
    return names


def check_options(group: dict[str, Any], defaults: Mapping[str, Any], adamw_options: Mapping[str, Any]) -> None:
    """Complete the options of a routed group, in place, and check them.

    Raises:
        ValueError: A hyper-parameter is out of range or unknown.
    """
    adamw_lr = group.pop("adamw_lr", None)
    if group["algorithm"] == "adamw":
        for key, value in adamw_options.items():
            group.setdefault(key, value)
        if adamw_lr is not None:
            group["lr"] = adamw_lr
        group["momentum"] = group["betas"][0]  # β₁ under the name that LearningRateMonitor and OneCycleLR know
    known = {"params", "algorithm", "name", *defaults, *adamw_options, "initial_lr"}
    unknown = sorted(set(group) - known)
    if unknown:
        raise ValueError(f"Group {group['name']!r} has options that Muon does not know: {', '.join(unknown)}.")
    options = {**defaults, **group}
    for key in ("lr", "weight_decay", "eps"):
        value = options.get(key, 0)
        if isinstance(value, str) or not 0 <= float(value) < float("inf"):
            hint = " (adamw_lr, where that was given)" if key == "lr" and group["algorithm"] == "adamw" else ""
            raise ValueError(f"{key}={value!r}{hint} must be a finite number, 0 or more.")
    betas = options.get("betas", (0, 0))
    if len(betas) != 2:
        raise ValueError(f"betas={betas!r} must be two numbers.")
    for key, value in (("momentum", options["momentum"]), ("betas", betas[0]), ("betas", betas[1])):
        if not 0 <= value < 1:
            raise ValueError(f"{key}: {value!r} must be in [0, 1).")
    dtype = options["orthogonalization_dtype"]
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"orthogonalization_dtype={dtype!r} must be a floating-point torch.dtype, torch.bfloat16 say, or None."
        )
    update_scale(options["scale"], 1, 1)
    if group["algorithm"] == "muon":
        sequence = nominal_sequence(options["orthogonalization"])
        if sequence is not None:
            check_range(sequence, dtype or torch.float32)
        group["orthogonalization"] = plain(options["orthogonalization"])
