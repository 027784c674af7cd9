"""What the optimizer must know about the processes it shares its work with; by default there are none."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["Alone", "NamedState", "Partition", "Range"]

Range = tuple[int, int]
NamedState = dict[str, dict[str, Tensor]]


class Partition(Protocol):
    """How the elements of the parameters are shared out, and what the processes tell each other in a step.

    Every process has the same parameters by name, shape and dtype, in any order, and calls ``maximum``,
    ``total``, ``publish`` and ``consolidate`` in the same order.

    A step updates the parameters stage by stage and publishes each stage, so that the others can have it while this
    process goes on. When a new step begins, everything of the last one has arrived.
    """

    @property
    def is_sharded(self) -> bool:
        """Whether other processes hold a part of the state."""

    def ranges(self, name: str, numel: int) -> Sequence[Range]:
        """The runs of elements of a parameter that this process updates and keeps the state of, ascending."""

    def check_gradients(self) -> None:
        """Settle which gradients take part in the step, and raise if they are not yet where they belong."""

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

    def stages(self, names: Sequence[str]) -> Sequence[Collection[str]]:
        """Parameters by name, in the order in which to update them: each in one stage."""

    def publish(self, stage: int) -> None:
        """Start to bring what each process has updated in this stage to all of them."""

    def finish_publishing(self) -> None:
        """Wait until everything that was published has arrived."""

    def end_step(self) -> None:
        """The gradients have been used, and everything is published."""

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

    def stages(self, names: Sequence[str]) -> Sequence[Collection[str]]:
        """All at once: the larger the batches, the better."""
        return [names]

    def publish(self, stage: int) -> None:
        """Nobody to tell."""

    def finish_publishing(self) -> None:
        """Nothing is on its way."""

    def end_step(self) -> None:
        """Nothing is kept of them."""

    def consolidate(self, state: Mapping[str, Mapping[str, Tensor]], to: int) -> NamedState | None:
        """The state is whole as it is."""
        return {name: dict(entries) for name, entries in state.items()}
