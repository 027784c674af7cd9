"""Pure functions of tensors: definition, unit, cost and source of every measure."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_muon.orthogonalize import PolynomialSequence

__all__ = [
    "cosine",
    "descent_kept",
    "fail_fraction",
    "lifted",
    "nuclear_rank",
    "orthogonality_error",
    "participation_rank",
    "promised_residual",
    "quantile",
    "rms",
    "scaled_quantile",
    "spike",
    "stable_rank",
    "svd_entropy",
]

# a singular value that ends below this has failed: its direction is all but missing from the update
_FAILED_BELOW = 0.1


def rms(square_sum: float, numel: int) -> float:
    """Root mean square ``√(Σx²/n)`` from the sum of squares; the unit of ``x``."""
    return math.sqrt(square_sum / numel)


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


def quantile(sigma: Tensor, percent: int) -> Tensor:
    """The singular value at descending rank ``⌈percent/100 · r⌉``: 10 gives a large one, 95 a small one.

    Args:
        sigma: ``(..., r)``, descending.
        percent: 1 to 100.

    Returns:
        ``(...)``.
    """
    rank = -(-percent * sigma.shape[-1] // 100)  # in whole numbers: 0.1 · 30 is above 3 in floating point
    return sigma[..., rank - 1]


def participation_rank(sigma: Tensor) -> Tensor:
    """``(Σσ²)²/Σσ⁴``: how many directions have the energy, 1 to ``r``; 0 for a zero matrix. ``(..., r)`` → ``(...)``.

    Its power -1/4 is the Schatten-4 norm in units of the Frobenius norm.
    """
    fourth = sigma.pow(4).sum(dim=-1)
    return sigma.square().sum(dim=-1).square() / torch.where(fourth == 0, 1.0, fourth)


def nuclear_rank(sigma: Tensor) -> Tensor:
    """``(Σσ)²/Σσ²``: another count of directions, 1 to ``r``, to which small σ add more; 0 for a zero matrix.
    ``(..., r)`` → ``(...)``.

    Its root is the nuclear norm in units of the Frobenius norm: the descent of the exact polar factor.
    """
    energy = sigma.square().sum(dim=-1)
    return sigma.sum(dim=-1).square() / torch.where(energy == 0, 1.0, energy)


def scaled_quantile(sigma: Tensor, percent: int) -> Tensor:
    """``quantile · √r``: in units of what all would be if they were equal, which takes out what width alone does
    (``σ ~ r^-½``, arXiv 2606.04058). ``(..., r)`` → ``(...)``."""
    return quantile(sigma, percent) * math.sqrt(sigma.shape[-1])


def cosine(product: float, square: float, other_square: float) -> float:
    """``⟨a, b⟩/(‖a‖·‖b‖)``, -1 to 1; 0 where one of them is zero."""
    norms = math.sqrt(square * other_square)
    return product / norms if norms else 0.0


def spike(sigma: Tensor) -> Tensor:
    """``σ₁²/Σσ²``, the share of the energy in one direction; 0 for a zero matrix. ``(..., r)`` → ``(...)``."""
    energy = sigma.square().sum(dim=-1)
    return sigma.amax(dim=-1).square() / torch.where(energy == 0, 1.0, energy)


def lifted(sigma: Tensor, sequence: PolynomialSequence | None, tolerance: float = 0.0) -> Tensor:
    """f(σ): where a sequence brings singular values, in exact arithmetic.

    Args:
        sigma: ``(..., r)``, all of a matrix's, relative to its Frobenius norm, whatever norm the sequence is for.
        sequence: What was applied; ``None`` is the exact polar factor.
        tolerance: Of the exact factor: what is not above ``tolerance · σ₁`` counts as no direction, and gives 0.

    Returns:
        ``(..., r)``.
    """
    if sequence is None:
        factor = (sigma > sigma.amax(dim=-1, keepdim=True) * tolerance).to(sigma.dtype)
        return torch.where(sigma.isnan(), sigma, factor)
    if sequence.norm == "schatten4":
        norm = sigma.pow(4).sum(dim=-1, keepdim=True).pow(0.25)
        sigma = sigma / torch.where(norm == 0, 1.0, norm)
    value = sigma / sequence.safety
    for a, b, c in sequence.steps:
        square = value.square()
        value = value * (a + square * (b + c * square))
    return value


def fail_fraction(outputs: Tensor) -> Tensor:
    """The share of singular values that end below 0.1; ``outputs`` is f(σ). ``(..., r)`` → ``(...)``."""
    share = (outputs < _FAILED_BELOW).to(outputs.dtype).mean(dim=-1)
    return torch.where(outputs.isnan().any(dim=-1), torch.nan, share)


def orthogonality_error(outputs: Tensor) -> Tensor:
    """``‖OOᵀ - I‖_F/√r``: 0 for an orthogonal update, 1 for none; ``outputs`` is f(σ). ``(..., r)`` → ``(...)``."""
    return (outputs.square() - 1).square().mean(dim=-1).sqrt()


def descent_kept(sigma: Tensor, outputs: Tensor) -> Tensor:
    """``Σσf(σ)/Σσ``: what is left of ``⟨O, N⟩``, the descent along what is orthogonalised, of the exact factor's.

    Args:
        sigma: ``(..., r)``.
        outputs: f(σ), ``(..., r)``.

    Returns:
        ``(...)``; 0 for a zero matrix.
    """
    total = sigma.sum(dim=-1)
    return (sigma * outputs).sum(dim=-1) / torch.where(total == 0, 1.0, total)


def promised_residual(sequence: PolynomialSequence) -> float:
    """The largest ``‖XXᵀ - I‖_F/√rank`` that a sequence allows before its last step, in exact arithmetic.

    All singular values lie in ``[0, h]`` there, so that each ``|σ² - 1|`` is at most ``max(1, h² - 1)``.
    """
    highest = (1.0, *sequence.highest())[-2]
    return max(1.0, highest**2 - 1)
