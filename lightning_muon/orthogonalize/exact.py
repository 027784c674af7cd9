"""The polar factor itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["polar_factor", "rank_tolerance"]


def rank_tolerance(shape: Sequence[int], dtype: torch.dtype) -> float:
    """Singular values up to this share of the largest count as none: numpy's and torch's own rule."""
    return max(shape) * torch.finfo(dtype).eps


def polar_factor(x: Tensor) -> Tensor:
    """The exact polar factor ``UVᵀ`` of ``X = UΣVᵀ``; directions that ``X`` does not have stay zero.

    float32 goes by the eigenvectors of ``XXᵀ`` in float64, which resolve singular values down to 1e-8 of the largest,
    below what float32 input knows of them; float64 by a singular value decomposition.

    Args:
        x: ``(batch, rows, cols)``, ``rows <= cols``, float32 or float64, of any scale.

    Returns:
        ``(batch, rows, cols)``, new memory; NaN for a matrix that is not finite.
    """
    finite = x.isfinite().all(dim=-1).all(dim=-1)[:, None, None]
    known = torch.where(finite, x, 0.0)  # both decompositions raise on NaN
    tolerance = rank_tolerance(x.shape[-2:], x.dtype)
    factor = _by_svd(known, tolerance) if x.dtype == torch.float64 else _by_eigenvectors(known, tolerance)
    return torch.where(finite, factor, torch.nan)


def _by_svd(x: Tensor, tolerance: float) -> Tensor:
    u, sigma, vh = torch.linalg.svd(x, full_matrices=False)
    factor: Tensor = (u * (sigma > sigma[:, :1] * tolerance).unsqueeze(-2)) @ vh
    return factor


def _by_eigenvectors(x: Tensor, tolerance: float) -> Tensor:
    wide = x.double()
    eigenvalues, u = torch.linalg.eigh(wide @ wide.mT)
    sigma = eigenvalues.clamp_min(0).sqrt()
    there = sigma > sigma[:, -1:] * tolerance
    inverse = torch.where(there, 1 / torch.where(there, sigma, 1.0), 0.0)
    factor: Tensor = ((u * inverse.unsqueeze(-2)) @ u.mT) @ wide
    return factor.to(x.dtype)
