"""A parameter as a step sees it: the part of it that this process updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_muon.partition import Range

__all__ = ["OwnedParameter"]


@dataclass(frozen=True)
class OwnedParameter:
    """A parameter with a gradient, of which this process owns something.

    Attributes:
        name: Its name.
        param: The parameter.
        state: Its optimizer state; the tensors hold the owned elements, one range after the other.
        ranges: The runs of elements that this process owns, ascending.
        group: Its parameter group.
    """

    name: str
    param: nn.Parameter
    state: dict[str, Any]
    ranges: Sequence[Range]
    group: Mapping[str, Any]

    def flat(self) -> tuple[Tensor, Tensor]:
        """Weight and gradient, ``(numel,)`` each; the weight is a copy if the parameter is not contiguous."""
        assert self.param.grad is not None
        return self.param.detach().reshape(-1), self.param.grad.reshape(-1)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """``(start, stop, offset)`` per range: where it lies in the parameter and in the state."""
        offset = 0
        for start, stop in self.ranges:
            yield start, stop, offset
            offset += stop - start

    def write_back(self, weight: Tensor) -> None:
        """Bring the weight of ``flat`` into the parameter, if it was a copy."""
        if not self.param.is_contiguous():
            self.param.copy_(weight.view_as(self.param))
