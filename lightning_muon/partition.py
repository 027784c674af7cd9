"""What the optimizer must know about the processes it shares its work with; by default there are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["Alone", "NamedState", "Partition", "Range"]

Range = tuple[int, int]
NamedState = dict[str, dict[str, Tensor]]


class Partition(Protocol):
    """How the elements of the parameters are shared out, and what the processes tell each other in a step.

    Every process has the same parameters by name, shape and dtype, in any order, and calls ``maximum``,
    ``total``, ``publish`` and ``consolidate`` in the same order.
    """

    @property
    def is_sharded(self) -> bool:
        """Whether other processes hold a part of the state."""

    def ranges(self, name: str, numel: int) -> Sequence[Range]:
        """The runs of elements of a parameter that this process updates and keeps the state of, ascending."""

    def check_gradients(self) -> None:
        """Raise if the gradients of this step are not yet where they belong."""

    @property
    def rank(self) -> int:
        """Number of this process among those that share the work."""

    @property
    def world_size(self) -> int:
        """How many processes share the work."""

    def forget_gradients(self) -> None:
        """The gradients of this step have been dropped by the user."""

    def maximum(self, values: Tensor) -> Tensor:
        """The element-wise maximum over the processes, in place."""

    def total(self, values: Tensor) -> Tensor:
        """The element-wise sum over the processes, in place."""

    def publish(self) -> None:
        """Bring what each process has updated to all of them."""

    def consolidate(self, state: Mapping[str, Mapping[str, Tensor]], to: int) -> NamedState | None:
        """Assemble everybody's state, by parameter name and flat over the whole parameter, on the process ``to``
        (CPU tensors); ``None`` on the others."""


class Alone:
    """One process, or replicas that each do all the work."""

    is_sharded = False
    rank = 0
    world_size = 1

    def ranges(self, name: str, numel: int) -> Sequence[Range]:
        """All elements."""
        return [(0, numel)]

    def check_gradients(self) -> None:
        """They are where they were computed."""

    def forget_gradients(self) -> None:
        """Nothing is kept of them."""

    def maximum(self, values: Tensor) -> Tensor:
        """Nobody to ask."""
        return values

    def total(self, values: Tensor) -> Tensor:
        """Nobody to add to."""
        return values

    def publish(self) -> None:
        """Nobody to tell."""

    def consolidate(self, state: Mapping[str, Mapping[str, Tensor]], to: int) -> NamedState | None:
        """The state is whole as it is."""
        return {name: dict(entries) for name, entries in state.items()}
