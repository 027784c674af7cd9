"""What the iteration's own products say about a matrix, for the price of adding up their entries."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Probe"]


@dataclass
class Probe:
    """Looks at the first and the last ``XXᵀ`` of an iteration."""

    _norms: list[Tensor] = field(default_factory=list)
    _traces: list[Tensor] = field(default_factory=list)
    _distances: list[Tensor] = field(default_factory=list)
    _rows: int = 0

    def first(self, gram: Tensor) -> None:
        """See ``XXᵀ`` of the input, ``(..., rows, rows)``; its scale does not matter."""
        gram = gram.float()
        self._norms.append(torch.linalg.vector_norm(gram, dim=(-2, -1)).reshape(-1))
        self._traces.append(gram.diagonal(dim1=-2, dim2=-1).sum(-1).reshape(-1))

    def last(self, gram: Tensor) -> None:
        """See ``XXᵀ`` before the last step, ``(..., rows, rows)``."""
        distance = gram.float().clone()
        distance.diagonal(dim1=-2, dim2=-1).sub_(1)
        self._distances.append(torch.linalg.vector_norm(distance, dim=(-2, -1)).reshape(-1))
        self._rows = gram.shape[-1]  # the same in all calls

    def collected(self) -> tuple[Tensor, Tensor]:
        """``(batch,)`` each, in the order seen: participation ranks ``(Σσ²)²/Σσ⁴`` of the inputs, which say how many
        directions have the energy, from 1 to the rank, 0 for a zero matrix; and residuals ``‖XXᵀ - I‖_F/√rows`` before
        the last step, which say how far from orthogonal the matrices still are there."""
        energy = torch.cat(self._norms).square()
        participation_ranks = torch.cat(self._traces).square() / torch.where(energy == 0, 1.0, energy)
        return participation_ranks, torch.cat(self._distances) / self._rows**0.5
