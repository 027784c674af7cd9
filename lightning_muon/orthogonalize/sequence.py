"""What a sequence of odd polynomials is, and what it does to a singular value."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

__all__ = ["Norm", "PolynomialSequence", "Steps"]

Steps = tuple[tuple[float, float, float], ...]
Norm = Literal["frobenius", "schatten4"]

_MOST_HEAD_ROOM = 2.0


@dataclass(frozen=True)
class PolynomialSequence:
    """A composition of odd quintic polynomials ``σ → aσ + bσ³ + cσ⁵``, applied to normalised singular values.

    Attributes:
        name: The name in the registry, or what it was made as.
        steps: ``(a, b, c)`` per step, in order.
        source: Where the coefficients are published, or how they were made.
        guarantee: ``(smallest σ, lowest output, highest output)``: every normalised singular value in
            ``[smallest σ, 1]`` ends in ``[lowest output, highest output]``, in exact arithmetic. ``None`` where
            nothing is known.
        safety: The input is divided by ``safety · norm``; head-room for rounding above σ = 1.
        norm: The norm that the input is divided by. ``"schatten4"`` is ``(Σσ⁴)^¼ = ‖XXᵀ‖_F^½``, which lies between the
            largest singular value and the Frobenius norm, so that the σ that have to be lifted start higher (Schatten-p
            bounds on σ₁: arXiv 2305.16173); the first product of the iteration gives it.
    """

    name: str
    steps: Steps
    source: str
    guarantee: tuple[float, float, float] | None = None
    safety: float = 1.0
    norm: Norm = "frobenius"

    def __call__(self, sigma: float) -> float:
        """The output singular value of a normalised singular value ``sigma``."""
        return list(self.path(sigma))[-1]

    def path(self, sigma: float) -> Iterator[float]:
        """Where a normalised singular value is after each step."""
        value = sigma / self.safety
        for a, b, c in self.steps:
            value = value * (a + b * value**2 + c * value**4)
            yield value

    def slope(self) -> float:
        """How much the smallest singular values grow: the derivative at 0."""
        return math.prod(a for a, _, _ in self.steps) / self.safety

    def highest(self) -> tuple[float, ...]:
        """The largest singular value after each step, of all that start in ``[0, 1]``; on a fine grid."""
        return _highest(self)

    def head_room(self) -> float:
        """The smallest normalised σ above 1 whose output leaves ``[0, 2]``; 2 if none below does, 1 if one below 1
        does.

        Rounding can put a singular value above 1; beyond the head-room a direction of the update turns around or
        explodes.
        """
        return _head_room(self)

    def first_unsafe(self) -> float | None:
        """The smallest normalised σ up to 1, on a fine grid, whose output is not in ``[0, 2]``; ``None`` if none is."""
        return next((sigma for sigma in _GRID if not _is_safe(self, sigma)), None)


# Evenly spaced to 1, and below by a thousandth of a decade each: a sign can turn at any scale.
_LINEAR = 4001
_GRID = tuple(
    sorted({10 ** (-12 + number / 1000) for number in range(9000)} | {n / _LINEAR for n in range(1, _LINEAR + 1)})
)


@lru_cache(maxsize=256)
def _highest(sequence: PolynomialSequence) -> tuple[float, ...]:
    paths = [tuple(sequence.path(number / _LINEAR)) for number in range(1, _LINEAR + 1)]
    return tuple(max(values) for values in zip(*paths, strict=True))


@lru_cache(maxsize=256)
def _head_room(sequence: PolynomialSequence) -> float:
    if sequence.first_unsafe() is not None:
        return 1.0
    width = _MOST_HEAD_ROOM - 1
    first = next((n for n in range(1, _LINEAR + 1) if not _is_safe(sequence, 1 + width * n / _LINEAR)), None)
    if first is None:
        return _MOST_HEAD_ROOM
    safe, unsafe = 1 + width * (first - 1) / _LINEAR, 1 + width * first / _LINEAR
    while unsafe - safe > 1e-9:
        middle = (safe + unsafe) / 2
        safe, unsafe = (middle, unsafe) if _is_safe(sequence, middle) else (safe, middle)
    return safe


def _is_safe(sequence: PolynomialSequence, sigma: float) -> bool:
    try:
        return 0 <= sequence(sigma) <= 2
    except OverflowError:
        return False
