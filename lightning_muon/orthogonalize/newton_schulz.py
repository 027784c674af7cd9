"""The iteration as it is printed: three products a step."""

from __future__ import annotations

from torch import Tensor

from lightning_muon.orthogonalize.products import multiply_add
from lightning_muon.orthogonalize.sequence import Steps
from lightning_muon.orthogonalize.telemetry import Probe

__all__ = ["newton_schulz", "newton_schulz_flops"]


def newton_schulz(x: Tensor, gram: Tensor, steps: Steps, probe: Probe | None = None) -> Tensor:
    """Apply ``p(X) = aX + b(XXᵀ)X + c(XXᵀ)²X`` once per step to wide, normalised matrices.

    Args:
        x: ``(rows, cols)`` or ``(batch, rows, cols)``, ``rows <= cols``, singular values in ``[0, 1]``; left untouched.
        gram: ``XXᵀ``, which whoever normalised ``x`` may have had to make.
        steps: ``(a, b, c)`` of each step.
        probe: Sees the last step's ``XXᵀ``.

    Returns:
        The shape of ``x``, new memory.
    """
    for number, (a, b, c) in enumerate(steps):
        if number:
            gram = x @ x.mT
        if probe is not None and number == len(steps) - 1:
            probe.last(gram)
        polynomial = multiply_add(gram, gram, gram, beta=b, alpha=c) if c else b * gram
        x = multiply_add(x, polynomial, x, beta=a)
    return x


def newton_schulz_flops(short: int, long: int, steps: Steps) -> int:
    """Floating-point operations for one matrix, two per multiply-add."""
    return sum(4 * short**2 * long + (2 * short**3 if c else 0) for _, _, c in steps)
