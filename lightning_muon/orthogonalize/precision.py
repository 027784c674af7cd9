"""Products that are computed in the precision that was chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

__all__ = ["full_precision"]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor a global permission may make the iteration's products coarser than it knows.

    Lightning runs a manual ``optimizer.step()`` within autocast, and ``torch.set_float32_matmul_precision("medium")``
    is a common line. What rounding the iteration can bear was decided for its own dtype.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    autocast = torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with autocast:
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
