"""How a step's gradient, momentum and update lie to each other: the inner products, taken while all three are there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_muon.matrices import MatrixKey

__all__ = ["Alignments"]


class Alignments:
    """Inner products of the parts of matrices that a process holds. Added up over all parts they are the matrices'.

    Attributes:
        sums: For each matrix ``(5,)``, float64: ⟨G, G⟩, ⟨M, M⟩, ⟨G, M⟩, ⟨U, U⟩, ⟨U, G⟩ of the gradient G, the momentum
            M after the step, and the orthogonal update U.
    """

    def __init__(self) -> None:
        self.sums: dict[MatrixKey, Tensor] = {}

    def add(
        self,
        keys: Iterable[MatrixKey],
        gradients: Sequence[Tensor],
        momenta: Sequence[Tensor],
        updates: Sequence[Tensor],
    ) -> None:
        """Take in some parts.

        Args:
            keys: Which matrix each is a part of.
            gradients, momenta, updates: The parts, of equal shapes.
        """
        # in float32 the square of a small gradient is nothing
        g, m, u = ([one.double() for one in tensors] for tensors in (gradients, momenta, updates))
        pairs = ((g, g), (m, m), (g, m), (u, u), (u, g))
        rows = torch.stack([_inner_products(a, b) for a, b in pairs], dim=1)
        for key, row in zip(keys, rows, strict=True):
            self.sums[key] = self.sums[key] + row if key in self.sums else row


def _inner_products(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([product.sum() for product in torch._foreach_mul(a, b)])
