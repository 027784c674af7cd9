"""The one call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_muon.orthogonalize.dispatch import default_dtype, iterate
from lightning_muon.orthogonalize.exact import polar_factor
from lightning_muon.orthogonalize.precision import full_precision
from lightning_muon.orthogonalize.safety import check_range
from lightning_muon.orthogonalize.sequence import PolynomialSequence
from lightning_muon.orthogonalize.specification import Orthogonalization, polynomial_sequence
from lightning_muon.orthogonalize.telemetry import Probe

__all__ = ["orthogonalize", "orthogonalize_batch"]


@torch.no_grad()
def orthogonalize(
    x: Tensor, orthogonalization: Orthogonalization = "polar_express5", *, dtype: torch.dtype | None = None
) -> Tensor:
    """Approximate the polar factor ``UVᵀ`` of each matrix ``X = UΣVᵀ``.

    The result does not depend on the scale of ``x``, however large or small; a zero matrix gives zero, and a
    matrix with a NaN or an infinity gives NaN, so that the fault stays visible.

    Args:
        x: ``(..., rows, cols)``, floating point; never changed and never aliased.
        orthogonalization: A name from ``available_sequences``, the ``(a, b, c)`` of each step, or a mapping such as
            ``{"name": "polar_express", "steps": 6, "lower": 1e-4}``.
        dtype: The dtype of the iteration; ``None`` is ``default_dtype``. ``"exact"`` never runs below float32.

    Returns:
        ``(..., rows, cols)`` in the dtype of ``x``, new memory.

    Raises:
        TypeError: ``x`` is no dense tensor, or ``dtype`` no floating-point dtype.
        ValueError: ``x`` has fewer than two dimensions or is not floating point, ``orthogonalization`` is unknown, or
            the sequence is not safe in this dtype.
    """
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        kind = f"a tensor of layout {x.layout}" if isinstance(x, Tensor) else f"{type(x).__name__}"
        raise TypeError(f"orthogonalize needs a dense torch.Tensor; got {kind}.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"orthogonalize: dtype={dtype!r} must be a floating-point torch.dtype, torch.float32 say, or None."
        )
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"orthogonalize needs floating-point matrices (..., rows, cols); got {x.dtype} of shape {tuple(x.shape)}."
        )
    sequence = polynomial_sequence(orthogonalization)
    if x.numel() == 0:
        return torch.empty_like(x)
    rows, cols = x.shape[-2:]
    batch = x.reshape(-1, rows, cols)
    result = orthogonalize_batch(batch.mT if rows > cols else batch, sequence, dtype)
    result = result.mT if rows > cols else result
    return result.reshape(x.shape).contiguous()


@torch.no_grad()
def orthogonalize_batch(
    x: Tensor, sequence: PolynomialSequence | None, dtype: torch.dtype | None = None, probe: Probe | None = None
) -> Tensor:
    """The same for wide matrices and a sequence that has been looked up.

    Args:
        x: ``(batch, rows, cols)``, ``rows <= cols``, not empty; left untouched.
        sequence: What to apply; ``None`` is the exact polar factor.
        dtype: See ``orthogonalize``.
        probe: Sees the first and the last ``XXᵀ`` of the iteration; the exact factor has none.

    Returns:
        ``(batch, rows, cols)`` in the dtype of ``x``, new memory.
    """
    with full_precision(x.device):
        return _orthogonalize_batch(x, sequence, dtype or default_dtype(x), probe)


def _orthogonalize_batch(
    x: Tensor, sequence: PolynomialSequence | None, dtype: torch.dtype, probe: Probe | None
) -> Tensor:
    precise = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
    if sequence is None:
        return polar_factor(x.to(precise)).to(x.dtype)
    check_range(sequence, dtype)
    safety = sequence.safety if sequence.norm == "frobenius" else 1.0  # Schatten's comes later
    return iterate(_normalize(x.to(precise), safety).to(dtype), sequence, probe).to(x.dtype)


def _normalize(x: Tensor, safety: float) -> Tensor:
    """``X / (safety · ‖X‖_F)`` per matrix, float32 at least. New memory.

    Dividing by the largest entry first keeps the squares of the norm from over- or underflowing, so there is no
    epsilon, and a gradient of 1e-30 is as good as one of 1.
    """
    tiny = torch.finfo(x.dtype).tiny  # for zeros, which stay zeros; NaN passes
    scaled = x / torch.linalg.vector_norm(x, math.inf, dim=(-2, -1), keepdim=True).clamp_min(tiny)
    norm = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    normalized: Tensor = scaled / norm.mul_(safety).clamp_min_(tiny)
    return normalized
