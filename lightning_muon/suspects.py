"""What a built-in rule took for a matrix like any other, and may be the output head: no name and no type tells."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_muon.routes import Route

__all__ = ["suspected_heads", "warn_of_heads"]


def suspected_heads(param_groups: Sequence[Mapping[str, Any]], routes: Mapping[str, Route]) -> list[str]:
    """A sentence about each matrix that has the shape of an embedding, stands outside numbered layers, and is Muon's.

    Args:
        param_groups: The optimizer's.
        routes: What was decided on each parameter, by name.
    """
    shapes = {
        name: tuple(param.shape)
        for group in param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }
    embeddings = {shape: name for name, shape in shapes.items() if routes[name].rule == "embedding"}
    return [
        f"{name!r} goes to Muon and has the shape of the embedding {embeddings[shape]!r}, {shape}. If it is the output"
        f' head, it is AdamW\'s: rules=[lm.Rule(r"^{re.escape(name)}$", algorithm="adamw")]. If it is not, say'
        ' algorithm="muon".'
        for name, shape in shapes.items()
        if routes[name].rule == "matrix" and shape in embeddings and not any(map(str.isdigit, name.split(".")))
    ]


def warn_of_heads(param_groups: Sequence[Mapping[str, Any]], routes: Mapping[str, Route]) -> None:
    """Say so where the optimizer is made, on one process."""
    if os.environ.get("LOCAL_RANK", "0") != "0" or os.environ.get("RANK", "0") != "0":
        return
    for sentence in suspected_heads(param_groups, routes):
        warnings.warn(sentence, UserWarning, stacklevel=3)
