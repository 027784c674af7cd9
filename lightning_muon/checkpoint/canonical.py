"""The one checkpoint that all strategies share, from a file or from a sharded folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_muon.checkpoint.atomic import recover
from lightning_muon.checkpoint.files import load_file
from lightning_muon.checkpoint.folders import load_whole
from lightning_muon.checkpoint.named import from_named

__all__ = ["OPTIMIZERS", "as_trainers", "load_canonical"]

OPTIMIZERS = "lightning_muon_optimizers"
"""In a sharded checkpoint, what its optimizers' states hold besides tensors, by key."""

_TRAINERS_OPTIMIZER = "optimizer_"


def load_canonical(path: Path, *, weights_only: bool = True) -> dict[str, Any]:
    """Load a checkpoint into the CPU memory of this process, whatever saved it.

    Args:
        path: A file, or the folder of a sharded checkpoint.
        weights_only: ``False`` lets it run any code.

    Returns:
        What the Trainer or Fabric would have saved on one process.

    Raises:
        CheckpointError: It is missing, torn, altered, or unsafe.
    """
    recover(path)
    if not path.is_dir():
        checkpoint: dict[str, Any] = load_file(path, weights_only=weights_only)
        return checkpoint
    state, meta = load_whole(path, weights_only=weights_only)
    rests = meta.pop(OPTIMIZERS, {})
    return as_trainers({**meta, **state}, {key: from_named(state.get(key, {}), rest) for key, rest in rests.items()})


def as_trainers(checkpoint: Mapping[str, Any], optimizers: Mapping[str, Any]) -> dict[str, Any]:
    """Put optimizers' states where they belong: in the Trainer's list, or under Fabric's keys."""
    if "pytorch-lightning_version" not in checkpoint:
        return {**checkpoint, **optimizers}
    rest = {key: value for key, value in checkpoint.items() if key not in optimizers}
    if optimizers:
        rest["optimizer_states"] = [optimizers[f"{_TRAINERS_OPTIMIZER}{n}"] for n in range(len(optimizers))]
    return rest
