"""Pure functions of tensors: definition, unit, cost and source of every measure."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["rms", "spectral_norm", "stable_rank", "svd_entropy"]


def rms(square_sum: float, numel: int) -> float:
    """Root mean square ``√(Σx²/n)`` from the sum of squares; the unit of ``x``."""
    return math.sqrt(square_sum / numel)


def spectral_norm(sigma: Tensor) -> Tensor:
    """σ₁, the largest singular value. ``(..., r)`` → ``(...)``."""
    return sigma.amax(dim=-1)


def stable_rank(sigma: Tensor) -> Tensor:
    """``‖X‖_F² / σ₁²``, from 1 to the rank; 0 for a zero matrix. ``(..., r)`` → ``(...)``."""
    largest = sigma.amax(dim=-1).square()
    return sigma.square().sum(dim=-1) / torch.where(largest == 0, 1.0, largest)


def svd_entropy(sigma: Tensor) -> Tensor:
    """``-Σ p ln p / ln n`` with ``p = σ² / Σσ²`` over the ``n`` singular values: 1 if all are equal, 0 if one is.

    Moonlight (arXiv 2502.16982, §3.4). ``(..., r)`` → ``(...)``; 0 for a zero matrix and for ``n = 1``.
    """
    energy = sigma.square()
    total = energy.sum(dim=-1, keepdim=True)
    p = energy / torch.where(total == 0, 1.0, total)
    return -torch.xlogy(p, p).sum(dim=-1) / math.log(max(sigma.shape[-1], 2))
