"""``"auto"``: the fewest steps that lift what a matrix's momentum has to be lifted.

A Polar Express of k steps, the best there is, brings every singular value from ``reach(k)`` on into the band. So one
number says what a matrix needs: a low quantile of its spectrum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muon.orthogonalize.generator import polar_express, smallest_lower
from lightning_muon.orthogonalize.sequence import PolynomialSequence
from lightning_muon.orthogonalize.spectrum import noise_floor

__all__ = ["Auto"]

_FEWEST_STEPS = 2
# Fewer steps are taken only where the quantile has this to spare: spectra breathe from one estimate to the next.
_SPARE = 1.5
# The input is rounded once, and once more when it is divided by the Schatten-4 norm.
_ROUNDINGS = 2


@dataclass(frozen=True)
class Auto:
    """How steps are chosen.

    Args:
        quantile: The share of a matrix's singular values that may be left below the band.
        band: The others come within this of 1.
        every: Optimizer steps between two looks at the spectra; before, at 1, 2, 4, 8, …
        most_steps: Never more than these.

    Raises:
        ValueError: An argument out of range.
    """

    quantile: float = 0.1
    band: float = 0.1
    every: int = 100
    most_steps: int = 8

    def __post_init__(self) -> None:
        for key in ("quantile", "band"):
            value = getattr(self, key)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"auto: {key}={value!r} must be a number.")
        if not 0 <= self.quantile < 1:
            raise ValueError(f"auto: quantile={self.quantile!r} must be in [0, 1).")
        if not 0.01 <= self.band <= 0.5:
            raise ValueError(f"auto: band={self.band!r} must be between 0.01 and 0.5.")
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"auto: every={self.every!r} must be a whole number of steps, 1 or more.")
        if not isinstance(self.most_steps, int) or not _FEWEST_STEPS <= self.most_steps <= 12:
            raise ValueError(f"auto: most_steps={self.most_steps!r} must be between {_FEWEST_STEPS} and 12.")

    def is_due(self, step: int) -> bool:
        """Whether to look at the spectra in this step, counted from 1."""
        return step % self.every == 0 or (step < self.every and step & (step - 1) == 0)

    def reach(self, steps: int) -> float:
        """The smallest σ that this many steps bring into the band, in units of the Schatten-4 norm."""
        return smallest_lower(steps, self.band)

    def sequence(self, steps: int) -> PolynomialSequence:
        """The polynomials of that many steps."""
        return polar_express(steps, self.reach(steps), norm="schatten4")

    def steps_for(
        self, sigma: Tensor, shape: tuple[int, int], dtype: torch.dtype, current: int | None = None
    ) -> int | None:
        """The number of steps for a matrix with these singular values.

        Args:
            sigma: ``(min(shape),)``, descending, relative to the Frobenius norm.
            shape: Of the matrix.
            dtype: Of the iteration.
            current: The steps taken so far, ``None`` at the first look.

        Returns:
            The number; ``None`` for a matrix that is zero or not finite, of which there is nothing to learn.
        """
        schatten = sigma.pow(4).sum().item() ** 0.25
        if not schatten > 0:
            return None
        left_out = min(int(self.quantile * len(sigma)), len(sigma) - 1)
        return self.choose(sigma[-1 - left_out].item() / schatten, self.floor(shape, dtype) / schatten, current)

    def floor(self, shape: tuple[int, int], dtype: torch.dtype) -> float:
        """What rounding adds to a singular value of a matrix of this shape, relative to its Frobenius norm."""
        return _ROUNDINGS * noise_floor(*shape, dtype)

    def choose(self, sigma: float, floor: float, current: int | None = None) -> int:
        """The number of steps for a matrix of which only the quantile is known.

        Args:
            sigma: The quantile of its singular values, in units of their Schatten-4 norm.
            floor: What rounding adds to a singular value, in the same unit: to lift smaller ones lifts noise.
            current: The steps taken so far, ``None`` at the first look.
        """
        needed = self._fewest(max(sigma, floor))
        if current is None or needed >= current:
            return needed
        return min(current, self._fewest(max(sigma / _SPARE, floor)))

    def _fewest(self, sigma: float) -> int:
        return next(
            (steps for steps in range(_FEWEST_STEPS, self.most_steps) if self.reach(steps) <= sigma), self.most_steps
        )
