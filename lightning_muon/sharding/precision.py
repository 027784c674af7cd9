"""Which precisions the sharded strategies take."""

from __future__ import annotations

import torch

__all__ = ["refuse_loss_scaling"]


def refuse_loss_scaling(scaler: torch.amp.GradScaler | None, strategy: str) -> None:
    """Refuse a gradient scaler: each rank would decide by itself whether to skip a step.

    Raises:
        ValueError: There is a scaler.
    """
    if scaler is not None:
        raise ValueError(
            f"{strategy} does not support precision='16-mixed' yet: the scaler decides on each rank by itself whether"
            " to skip a step. Use 'bf16-mixed', 'bf16-true' or '32-true'."
        )
