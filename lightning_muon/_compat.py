"""The few differences between the supported versions of torch."""

from __future__ import annotations

import torch.distributed as dist

__all__ = ["all_gather_single"]

# torch 2.13 renamed all_gather_into_tensor
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
