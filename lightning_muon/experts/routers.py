"""Which modules of a model are routers, and what their layers are called."""

from __future__ import annotations

import re
from collections import Counter

from torch import nn

from lightning_muon.names import canonical_name

__all__ = ["find_routers"]

_NAMES = frozenset({"gate", "router"})


def find_routers(
    model: nn.Module, routers: str | None = None, include: str | None = None, exclude: str | None = None
) -> dict[str, nn.Module]:
    """The routers by layer: a layer is the module that holds the router.

    A router is called `gate` or `router` and has a neighbour called `experts`, as in the models of `transformers`,
    unless `routers` says otherwise. A router at the top of the model, or one of several in the same module, is a layer
    of its own name.

    Args:
        model: The model, wrapped or not.
        routers: Regular expression, searched for in a module's name: the modules that are routers.
        include: Regular expression, searched for in a layer's name; `None` takes all.
        exclude: Regular expression for the layers that are left out.

    Returns:
        The routers by the name of their layer, in the order of the model.
    """
    named = {canonical_name(name): module for name, module in model.named_modules()}
    found = {
        name: module
        for name, module in named.items()
        if (re.search(routers, name) if routers is not None else _is_beside_experts(name, named))
    }
    in_the_same = Counter(_holder(name) for name in found)
    layers = {
        _holder(name) if _holder(name) and in_the_same[_holder(name)] == 1 else name: module
        for name, module in found.items()
    }
    return {
        layer: module
        for layer, module in layers.items()
        if (include is None or re.search(include, layer)) and not (exclude is not None and re.search(exclude, layer))
    }


def _holder(name: str) -> str:
    return name.rpartition(".")[0]


def _is_beside_experts(name: str, named: dict[str, nn.Module]) -> bool:
    holder, dot, own = name.rpartition(".")
    return own in _NAMES and f"{holder}{dot}experts" in named
