"""The cheapest polynomial sequence that still resolves a singular value."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

from lightning_muon.orthogonalize import available_sequences, orthogonalization_flops, polynomial_sequence

__all__ = ["resolution_limit", "smallest_sequence"]

# f(σ) that counts as resolved, and the largest output that a matrix may contain; Muon's published sets reach 0.68 to
# 1.31 in the range that they are built for.
_RESOLVED, _LARGEST = 0.7, 1.35
_POINTS, _SMALLEST = 4096, 1e-12
_NO_POLYNOMIAL = ("exact", "auto")


def smallest_sequence(sigma: float) -> str | None:
    """The cheapest named sequence with f(``sigma``) ≥ 0.7 and f ≤ 1.35 from ``sigma`` to 1, in exact arithmetic.

    Cost is that of a square matrix; of two that cost the same, the one with the larger f(``sigma``).

    Args:
        sigma: A singular value of the Frobenius-normalised matrix; above 1, which there is not, it counts as 1.

    Returns:
        A name for ``orthogonalization=``, or ``None`` where none of the named ones reaches so far down.

    Raises:
        ValueError: ``sigma`` is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"A singular value to resolve is positive; got {sigma}.")
    sigma = min(sigma, 1.0)
    resolving = []
    for name in available_sequences():
        if name in _NO_POLYNOMIAL:
            continue
        sequence = polynomial_sequence(name)
        assert sequence is not None
        output = sequence(sigma)
        if output >= _RESOLVED and max(output, _largest_from(name, sigma)) <= _LARGEST:
            resolving.append((orthogonalization_flops(1, 1, sequence), -output, name))
    return min(resolving)[-1] if resolving else None


def resolution_limit(name: str) -> float:
    """The smallest σ, to 0.7 %, that the named sequence brings to 0.7."""
    sequence = polynomial_sequence(name)
    assert sequence is not None
    return next(point for point, _ in _running_maxima(name) if sequence(point) >= _RESOLVED)


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
