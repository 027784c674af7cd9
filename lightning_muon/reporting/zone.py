"""Below which singular value the polynomial sequence in use fails."""

from __future__ import annotations

from functools import lru_cache

from lightning_muon.logs import ParameterDescription, Series
from lightning_muon.orthogonalize import PolynomialSequence, auto_settings, polynomial_sequence

__all__ = ["failure_limits", "failure_threshold"]

# f(σ) below it counts as missing from the update, as in muon/ns_fail_frac.
_FAILED = 0.1
_SMALLEST, _BISECTIONS = 1e-12, 60


@lru_cache(maxsize=256)
def failure_threshold(sequence: PolynomialSequence) -> float:
    """The σ up to which all f(σ) < 0.1, in units of the norm that the sequence divides its input by.

    Args:
        sequence: In exact arithmetic; its smallest singular values grow, as all of Muon's do.
    """
    low = high = _SMALLEST
    while high < 1 and sequence(high) < _FAILED:
        low, high = high, high * 1.1
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if sequence(middle) < _FAILED else (low, middle)
    return low


def failure_limits(description: ParameterDescription, participation: Series, steps_taken: Series) -> Series:
    """The threshold at every logged step, relative to the Frobenius norm as the logged σ are.

    Args:
        description: Says how the run orthogonalised the parameter.
        participation: Its momentum's participation rank by step: ``(Σσ⁴)^¼ = participation^(-¼)`` of a spectrum with
            ``Σσ² = 1``, which sequences that divide by the Schatten-4 norm need.
        steps_taken: The steps of the iteration by step, which ``"auto"`` needs.

    Returns:
        By step, for those steps at which what is needed was logged; empty for ``"exact"``, which misses nothing.
    """
    auto = auto_settings(description.orthogonalization)
    fixed = None if auto is not None else polynomial_sequence(description.orthogonalization)
    if auto is None and fixed is None:
        return {}
    limits = {}
    for step, rank in participation.items():
        sequence = fixed
        if auto is not None and steps_taken.get(step, 0) >= 1:
            sequence = auto.sequence(round(steps_taken[step]))
        if sequence is not None and rank > 0:
            norm = rank**-0.25 if sequence.norm == "schatten4" else 1.0
            limits[step] = failure_threshold(sequence) * norm
    return limits
