"""The one product the iterations are made of, for one matrix or a batch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["multiply_add"]


def multiply_add(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """``βC + α·AB``, rounded once. 2-D or 3-D; a batch of one is worth making 2-D: some CPU kernels run it at half the
    speed."""
    function = torch.addmm if c.ndim == 2 else torch.baddbmm
    return function(c, a, b, beta=beta, alpha=alpha)
