"""The reference iterations: what every faster one must agree with."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_muon.orthogonalize.polynomials import PolynomialSequence, Steps


def newton_schulz(x: Tensor, steps: Steps) -> Tensor:
    """Apply ``p(X) = aX + b(XXᵀ)X + c(XXᵀ)²X`` once per step to a batch of wide, normalised matrices.

    Args:
        x: ``(batch, rows, cols)`` with ``rows <= cols`` and singular values in ``[0, 1]``; left untouched.
        steps: ``(a, b, c)`` of each step.

    Returns:
        ``(batch, rows, cols)``, new memory.
    """
    if x.shape[0] == 1:  # one batched low-precision matrix can run at half the speed of a plain product
        return _newton_schulz_single(x[0], steps).unsqueeze(0)
    for a, b, c in steps:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if c else b * gram
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _newton_schulz_single(x: Tensor, steps: Steps) -> Tensor:
    for a, b, c in steps:
        gram = x @ x.mT
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c) if c else b * gram
        x = torch.addmm(x, polynomial, x, beta=a)
    return x


def polar_factor(x: Tensor) -> Tensor:
    """The exact polar factor ``UVᵀ`` of ``X = UΣVᵀ``; directions that ``X`` does not have stay zero.

    Args:
        x: ``(batch, rows, cols)``, float32 or float64.

    Returns:
        ``(batch, rows, cols)``, new memory.
    """
    finite = x.isfinite().all(dim=-1).all(dim=-1)[:, None, None]
    u, sigma, vh = torch.linalg.svd(torch.where(finite, x, 0.0), full_matrices=False)  # raises on NaN otherwise
    # numpy's and torch's own rule for the numerical rank
    threshold = sigma[:, :1] * max(x.shape[-2:]) * torch.finfo(x.dtype).eps
    factor = (u * (sigma > threshold).unsqueeze(-2)) @ vh
    return torch.where(finite, factor, torch.nan)


def orthogonalization_flops(rows: int, cols: int, sequence: PolynomialSequence | None) -> int:
    """Floating-point operations (two per multiply-add) of orthogonalising one ``(rows, cols)`` matrix.

    The iteration is counted exactly, product by product; ``"exact"`` (``None``) as 20 products' worth of
    ``short² · long``, an order of magnitude for a singular value decomposition.
    """
    short, long = sorted((rows, cols))
    if sequence is None:
        return 40 * short**2 * long
    return sum(4 * short**2 * long + (2 * short**3 if c else 0) for _, _, c in sequence.steps)
