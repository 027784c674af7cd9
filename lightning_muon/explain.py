"""What was decided for the user, in a table."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_muon.choosing import StepCounts, describe_counts
from lightning_muon.orthogonalize import default_dtype_of
from lightning_muon.routes import Route
from lightning_muon.updates import update_scale

__all__ = ["explain"]

_HEADER = ("parameter", "shape", "route", "matrices", "scale", "rule")


def explain(param_groups: Sequence[Mapping[str, Any]], routes: Mapping[str, Route], step_counts: StepCounts) -> str:
    """Every parameter with its shape, route, matrices, scale and the rule that decided; then the settings, and what
    ``"auto"`` has chosen."""
    rows, counts = [_HEADER], {"muon": 0, "adamw": 0}
    settings = []
    for group in param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            decision = routes[name]
            matrices, scales = "", ""
            if decision.algorithm == "muon" and decision.layout is not None:
                matrices, scales = decision.layout.describe(), _scales(group["scale"], decision)
            rows.append((name, str(tuple(param.shape)), decision.algorithm, matrices, scales, decision.rule))
            counts[decision.algorithm] += param.numel()
        settings.append(_settings(group))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    table.insert(1, "  ".join("-" * width for width in widths))
    total = sum(counts.values())
    shares = ", ".join(f"{name} {count:,} ({count / total:.1%})" for name, count in counts.items())
    return "\n".join([*table, "", f"{total:,} parameters: {shares}", *settings, *_chosen(step_counts)])


def _chosen(step_counts: StepCounts) -> list[str]:
    if not step_counts.counts:
        return []
    width = max(map(len, step_counts.counts))
    lines = [f"  {name.ljust(width)}  {describe_counts(counts)}" for name, counts in step_counts.counts.items()]
    return [f"orthogonalization='auto', as chosen in optimizer step {step_counts.looked}:", *lines]


def _scales(scale: str, decision: Route) -> str:
    layout = decision.layout
    assert layout is not None
    shapes = {(size, layout.cols) if layout.dim == 0 else (layout.rows, size) for size in layout.sizes}
    oriented = [shape[::-1] if layout.transposed else shape for shape in sorted(shapes)]
    return ", ".join(f"{update_scale(scale, *shape):.3g}" for shape in oriented)


def _settings(group: Mapping[str, Any]) -> str:
    keys = ["lr", "weight_decay"]
    keys += ["momentum", "nesterov", "scale"] if group["algorithm"] == "muon" else ["betas", "eps"]
    text = f"group {group['name']!r} by {group['algorithm']}: " + ", ".join(f"{key}={group[key]!r}" for key in keys)
    if group["algorithm"] == "muon":
        param = group["params"][0]
        dtype = group["orthogonalization_dtype"] or default_dtype_of(param.dtype, param.device, sys.maxsize)
        small = dtype == torch.bfloat16 and group["orthogonalization_dtype"] is None
        words = f"{dtype} (float32 below a short side of 128)" if small else f"{dtype}"
        text += f", orthogonalization={group['orthogonalization']!r} in {words} on {param.device.type}"
    return text
