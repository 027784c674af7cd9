"""The cheapest polynomial sequence that still resolves a singular value."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any

from lightning_muon.orthogonalize import available_sequences, orthogonalization_flops, polynomial_sequence

__all__ = ["label", "resolution_limit", "smallest_sequence"]

# f(σ) that counts as resolved, and the largest output that a matrix may contain; Muon's published sets reach 0.68 to
# 1.31 in the range that they are built for.
_RESOLVED, _LARGEST = 0.7, 1.35
_POINTS, _SMALLEST = 4096, 1e-12
_MOST_STEPS = 10
_LARGEST_LOWER = 0.5


def smallest_sequence(sigma: float) -> str | dict[str, Any] | None:
    """The cheapest sequence with f(``sigma``) ≥ 0.7 and f ≤ 1.35 from ``sigma`` to 1, in exact arithmetic.

    A published one if none is cheaper, else a Polar Express made for ``sigma``.

    Cost is that of a square matrix; of two published that cost the same, the one with the larger f(``sigma``).

    Args:
        sigma: A singular value of the Frobenius-normalised matrix; above 1, which there is not, it counts as 1.

    Returns:
        What ``orthogonalization=`` takes, or ``None`` where ten steps do not reach so far down.

    Raises:
        ValueError: ``sigma`` is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"A singular value to resolve is positive; got {sigma}.")
    sigma = min(sigma, 1.0)
    resolving = []
    for order, candidate in enumerate(_candidates(sigma)):
        sequence = polynomial_sequence(candidate)
        assert sequence is not None
        output = sequence(sigma)
        largest = _largest_from(candidate, sigma) if isinstance(candidate, str) else sequence.highest()[-1]
        if output >= _RESOLVED and max(output, largest) <= _LARGEST:
            is_made = not isinstance(candidate, str)
            resolving.append((orthogonalization_flops(1, 1, sequence), is_made, -output, order, candidate))
    return min(resolving)[-1] if resolving else None


def label(orthogonalization: str | dict[str, Any] | None) -> str:
    """In a few words: ``keller5``, ``4 steps from 0.005``, or ``none``."""
    if orthogonalization is None or isinstance(orthogonalization, str):
        return orthogonalization or "none"
    steps = orthogonalization["steps"]
    return f"{steps} step{'s' if steps > 1 else ''} from {orthogonalization['lower']:g}"


def resolution_limit(name: str) -> float:
    """The smallest σ, to 0.7 %, that the named sequence brings to 0.7."""
    sequence = polynomial_sequence(name)
    assert sequence is not None
    return next(point for point, _ in _running_maxima(name) if sequence(point) >= _RESOLVED)


def _candidates(sigma: float) -> Iterator[str | dict[str, Any]]:
    yield from (name for name in available_sequences() if name != "exact")
    digits = 10.0 ** (math.floor(math.log10(sigma)) - 1)
    lower = float(f"{min(math.floor(sigma / digits * (1 + 1e-9)) * digits, _LARGEST_LOWER):.2g}")
    yield from ({"name": "polar_express", "steps": steps, "lower": lower} for steps in range(1, _MOST_STEPS + 1))


def _largest_from(name: str, sigma: float) -> float:
    """The largest f on a grid over [σ, 1]."""
    return next(largest for point, largest in _running_maxima(name) if point >= sigma)


@lru_cache
def _running_maxima(name: str) -> list[tuple[float, float]]:
    """Ascending points from 1e-12 to 1, evenly spaced in log σ, each with the largest f from there to 1."""
    sequence = polynomial_sequence(name)
    assert sequence is not None
    descending = [_SMALLEST ** (number / (_POINTS - 1)) for number in range(_POINTS)]
    maxima = accumulate((sequence(point) for point in descending), max)
    return list(zip(descending, maxima, strict=True))[::-1]
