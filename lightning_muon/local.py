"""What of a tensor is in this process's memory."""

from __future__ import annotations

from torch import Tensor

__all__ = ["local", "local_numel"]


def local(tensor: Tensor) -> Tensor:
    """The piece of a tensor that this process holds: all of it, unless it is a ``DTensor``. Shares its memory."""
    to_local = getattr(tensor, "to_local", None)
    piece: Tensor = tensor if to_local is None else to_local()
    return piece.detach()


def local_numel(tensor: Tensor) -> int:
    """How many elements this process holds. Does not look at the values, which may still be on their way."""
    return local(tensor).numel() if hasattr(tensor, "to_local") else tensor.numel()
