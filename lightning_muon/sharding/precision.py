"""Precisions with a gradient scaler: whether a step overflows is decided for all processes together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.muon import Muon

__all__ = ["share_overflows"]


class _Scaler(ShardedGradScaler):
    """torch's scaler for sharded gradients; before it asks the other ranks, it makes sure that they can answer."""

    @override
    def unscale_(self, optimizer: Optimizer) -> None:
        bare = getattr(optimizer, "optimizer", optimizer)  # Trainer and Fabric wrap it
        if isinstance(bare, Muon):
            bare.partition.check_gradients()
        super().unscale_(optimizer)


def share_overflows(plugin: Any, strategy: str, group: dist.ProcessGroup | None = None) -> None:
    """Have a precision plugin's scaler ask all ranks whether a gradient has overflowed.

    Only an owner has the averaged gradient, so only it would see the overflow, and skip a step that the others take.
    torch's scaler for sharded gradients, which FSDP uses too, sums what was found before anybody decides.

    Args:
        plugin: The plugin, of the Trainer or of Fabric; its scaler is changed in place.
        strategy: The strategy's name, for error messages.
        group: The process group; ``None`` is the default one.

    Raises:
        ValueError: The plugin computes in float16 without a scaler, or its scaler is a class of the user's own.
    """
    if getattr(plugin, "precision", None) == "16-true":
        raise ValueError(
            f"{strategy} does not support precision='16-true': float16 gradients overflow without a scaler. Use"
            " '16-mixed', 'bf16-mixed', 'bf16-true' or '32-true'."
        )
    scaler = getattr(plugin, "scaler", None)
    if scaler is None or isinstance(scaler, _Scaler):
        return
    if type(scaler) not in (torch.amp.GradScaler, torch.cuda.amp.GradScaler, ShardedGradScaler):
        raise ValueError(
            f"{strategy} cannot have {type(scaler).__qualname__} ask the other processes about overflows. Pass a"
            " torch.amp.GradScaler."
        )
    scaler.__class__ = _Scaler  # the user's object, with its scale and whatever it has loaded
    scaler.process_group = group or dist.group.WORLD
