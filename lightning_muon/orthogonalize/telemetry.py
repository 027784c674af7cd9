"""What the iteration's own products say about a matrix, for the price of adding up their entries."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Probe"]


@dataclass
class Probe:
    """Looks at the first and the last ``XXᵀ`` of an iteration.

    Attributes:
        participation_ranks: ``(Σσ²)²/Σσ⁴`` of the inputs, one entry per call of ``first``: how many directions
            have the energy, from 1 to the rank; 0 for a zero matrix.
        residuals: ``‖XXᵀ - I‖_F/√rows`` before the last step: how far from orthogonal the matrices still are there. One
            entry per call of ``last``.
    """

    participation_ranks: list[Tensor] = field(default_factory=list)
    residuals: list[Tensor] = field(default_factory=list)

    def first(self, gram: Tensor) -> None:
        """See ``XXᵀ`` of the input, ``(..., rows, rows)``; its scale does not matter."""
        gram = gram.float()
        energy = torch.linalg.vector_norm(gram, dim=(-2, -1)).square()
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        self.participation_ranks.append(trace.square() / torch.where(energy == 0, 1.0, energy))

    def last(self, gram: Tensor) -> None:
        """See ``XXᵀ`` before the last step, ``(..., rows, rows)``."""
        distance = gram.float().clone()
        distance.diagonal(dim1=-2, dim2=-1).sub_(1)
        self.residuals.append(torch.linalg.vector_norm(distance, dim=(-2, -1)) / gram.shape[-1] ** 0.5)

    def collected(self) -> tuple[Tensor, Tensor]:
        """``(batch,)`` each: participation ranks and residuals, in the order seen."""
        return (
            torch.cat([value.reshape(-1) for value in self.participation_ranks]),
            torch.cat([value.reshape(-1) for value in self.residuals]),
        )
