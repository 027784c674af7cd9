"""The iteration on the small Gram matrix: several steps cost two products with the long side.

All steps of ``X ← (aI + Z)X``, ``Z = bR + cR²``, ``R = XXᵀ``, commute, so their product ``Q`` and the next ``R`` can be
followed among square matrices of the short side, and ``X`` is multiplied once (Gram–Newton–Schulz, dao-lab.ai, March
2026). What it costs in accuracy: rounding in ``R``, which the true ``XXᵀ`` would not have, grows by ``a²`` a step where
the singular values are small. So ``X`` and ``R`` are made anew (a restart) before that matters.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor

from lightning_muon.orthogonalize.products import multiply_add
from lightning_muon.orthogonalize.safety import unit_roundoff
from lightning_muon.orthogonalize.sequence import PolynomialSequence, Steps
from lightning_muon.orthogonalize.telemetry import Probe

__all__ = ["gram_newton_schulz", "gram_newton_schulz_flops", "restarts"]


def gram_newton_schulz(
    x: Tensor, gram: Tensor, steps: Steps, restart_at: tuple[int, ...], probe: Probe | None = None
) -> Tensor:
    """What `newton_schulz` computes, by products of the short side.

    Args:
        x: ``(rows, cols)`` or ``(batch, rows, cols)``, ``rows <= cols``, singular values in ``[0, 1]``; left untouched.
        gram: ``XXᵀ``.
        steps: ``(a, b, c)`` of each step.
        restart_at: Numbers of the steps before which ``X`` and ``XXᵀ`` are made anew, ascending, above 0.
        probe: Sees the last step's ``XXᵀ``.

    Returns:
        The shape of ``x``, new memory.
    """
    for first, end in itertools.pairwise((0, *restart_at, len(steps))):
        if first:
            gram = x @ x.mT
        product = None
        for number in range(first, end):
            a, b, c = steps[number]
            if probe is not None and number == len(steps) - 1:
                probe.last(gram)
            z = multiply_add(gram, gram, gram, beta=b, alpha=c) if c else b * gram
            if number + 1 < end:
                half = multiply_add(gram, gram, z, beta=a)
                gram = multiply_add(half, z, half, beta=a)
            if product is None:
                product = z
                product.diagonal(dim1=-2, dim2=-1).add_(a)  # half and gram have been made from z without it
            else:
                product = multiply_add(product, z, product, beta=a)
        assert product is not None  # no block is empty
        x = product @ x
    return x


def gram_newton_schulz_flops(short: int, long: int, steps: Steps, restart_at: tuple[int, ...]) -> int:
    """Floating-point operations for one matrix, two per multiply-add."""
    blocks = len(restart_at) + 1
    squares = sum(1 for _, _, c in steps if c)
    return blocks * 4 * short**2 * long + 2 * short**3 * (squares + 3 * (len(steps) - blocks))


@lru_cache(maxsize=256)
def restarts(sequence: PolynomialSequence, dtype: torch.dtype) -> tuple[int, ...]:
    """Where to restart in this precision: as late as rounding allows, for a restart rounds ``X``.

    Between two restarts

    - the rounding of ``R`` grows by the product of the ``a²``. It may grow ``5/√u``-fold (u the unit roundoff) and, for
      float32 to keep five digits, 1000-fold;
    - the rounding of ``Q``, whose terms are as large as the product of the ``a`` and cancel where σ is large, moves the
      largest singular values. It may take half of what the sequence has of head-room. Polar Express has 0.04: enough
      for float16, but in bfloat16 (0.13 after its first two steps) no two steps can be joined; where that was tried,
      with any restarts, recorded momentum exploded (docs/orthogonalization.md).
    """
    unit = unit_roundoff(dtype)
    most_growth, most_error = min(5 / math.sqrt(unit), 1000.0), (sequence.head_room() - 1) / 2
    steps = sequence.steps
    places, growth, product = [], 1.0, steps[0][0]
    for number in range(1, len(steps)):
        growth *= steps[number - 1][0] ** 2
        product *= steps[number][0]
        if growth > most_growth or product * unit > most_error:
            places.append(number)
            growth, product = 1.0, steps[number][0]
    return tuple(places)
