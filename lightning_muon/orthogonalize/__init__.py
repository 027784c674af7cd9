"""From a matrix to its polar factor. Knows nothing of parameters, optimizers or processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_muon.orthogonalize.newton_schulz import newton_schulz, orthogonalization_flops, polar_factor
from lightning_muon.orthogonalize.polynomials import (
    PolynomialSequence,
    available_sequences,
    polynomial_sequence,
)

__all__ = [
    "PolynomialSequence",
    "available_sequences",
    "default_dtype",
    "orthogonalization_flops",
    "orthogonalize",
    "polynomial_sequence",
]


def default_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the iteration where none is asked for.

    float64 for float64 input; otherwise bfloat16 on CUDA, where it is several times faster and the iteration
    tolerates its rounding, and float32 elsewhere, where low precision is slow or missing.
    """
    if x.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if x.device.type == "cuda" else torch.float32


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    orthogonalization: str | Sequence[Sequence[float]] = "polar_express5",
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Approximate the polar factor ``UVᵀ`` of each matrix ``X = UΣVᵀ``.

    The result does not depend on the scale of ``x``, however large or small; a zero matrix gives zero, and a
    matrix with a NaN or an infinity gives NaN, so that the fault stays visible.

    Args:
        x: ``(..., rows, cols)``, floating point; never changed and never aliased.
        orthogonalization: A name from ``available_sequences``, or the ``(a, b, c)`` of each step.
        dtype: The dtype of the iteration; ``None`` is ``default_dtype``. ``"exact"`` never runs below float32.

    Returns:
        ``(..., rows, cols)`` in the dtype of ``x``, new memory.

    Raises:
        ValueError: ``x`` has fewer than two dimensions or is not floating point, or ``orthogonalization`` is unknown.
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"orthogonalize needs floating-point matrices (..., rows, cols); got {x.dtype} of shape {tuple(x.shape)}."
        )
    sequence = polynomial_sequence(orthogonalization)
    if x.numel() == 0:
        return torch.empty_like(x)
    rows, cols = x.shape[-2:]
    wide = x.reshape(-1, rows, cols)
    wide = wide.mT if rows > cols else wide
    dtype = dtype or default_dtype(x)
    exact = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
    normalized = _normalize(wide.to(exact), sequence.safety if sequence else 1.0)
    if sequence is None:
        result = polar_factor(normalized)
    else:
        result = newton_schulz(normalized.to(dtype), sequence.steps)
    result = result.mT if rows > cols else result
    return result.to(x.dtype).reshape(x.shape).contiguous()


def _normalize(x: Tensor, safety: float) -> Tensor:
    """``X / (safety · ‖X‖_F)`` per matrix, float32 at least. New memory.

    Dividing by the largest entry first keeps the squares of the norm from over- or underflowing, so there is no
    epsilon, and a gradient of 1e-30 is as good as one of 1.
    """
    largest = x.abs().amax(dim=(-2, -1), keepdim=True)
    scaled = x / torch.where(largest == 0, 1.0, largest)
    norm = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    return scaled / torch.where(norm == 0, 1.0, norm * safety)
