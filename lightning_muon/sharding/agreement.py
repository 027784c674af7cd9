"""What every rank must have chosen alike: each trains its share of the parameters by what it has been told."""

from __future__ import annotations

from torch import Tensor

from lightning_muon.muon import Muon

__all__ = ["choices"]


def choices(optimizer: Muon) -> dict[str, object]:
    """An optimizer's policies and its groups' options, in words that can be compared between processes."""
    found: dict[str, object] = {
        key: getattr(optimizer, key) for key in ("nonfinite", "idle_matrices", "master_weights")
    }
    for group in optimizer.param_groups:
        options = {key: _words(value) for key, value in group.items() if key not in ("params", "param_names")}
        found[f"group {group['name']!r}"] = options
    return found


def _words(value: object) -> str:
    return repr(value.tolist() if isinstance(value, Tensor) else value)  # not a tensor's device, which is each rank's
