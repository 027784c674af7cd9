"""What is logged of the loads of experts, under which keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from lightning_muon.experts import measures
from lightning_muon.experts.counting import Counted

__all__ = ["logged_values"]


def logged_values(counted: Mapping[str, Counted], mode: Literal["brief", "detailed"]) -> dict[str, float]:
    """The values by logging key.

    Args:
        counted: What was counted, by layer; each has seen a token.
        mode: `"detailed"` adds the load of every expert.

    Returns:
        `moe/<family>/<layer>`, and `_min`, `_mean`, `_max` over the layers.
    """
    families: dict[str, dict[str, float]] = {}
    for layer, one in counted.items():
        of_layer = {
            "max_vio": measures.max_vio(one.tokens),
            "dead_experts": measures.dead_experts(one.tokens),
            "load_entropy": measures.load_entropy(one.tokens),
            "min_load": measures.min_load(one.tokens),
            "router_entropy": one.router_entropy,
            "routing_confidence": one.routing_confidence,
        }
        for family, value in of_layer.items():
            if value is not None:
                families.setdefault(family, {})[layer] = value
    values = {}
    for family, by_layer in families.items():
        values.update({f"moe/{family}/{layer}": value for layer, value in by_layer.items()})
        numbers = by_layer.values()
        values[f"moe/{family}/_min"], values[f"moe/{family}/_max"] = min(numbers), max(numbers)
        values[f"moe/{family}/_mean"] = sum(numbers) / len(numbers)
    if mode == "detailed":
        for layer, one in counted.items():
            fractions = measures.load_fractions(one.tokens).tolist()
            values.update({f"moe/load/{layer}.{expert}": value for expert, value in enumerate(fractions)})
    return values
