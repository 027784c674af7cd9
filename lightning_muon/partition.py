"""What the optimizer must know about the processes it shares its work with; by default there are none."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_muon.exchange import Exchange, InPlace
from lightning_muon.matrices import MatrixKey, MatrixLayout, MatrixPart

__all__ = ["Alone", "NamedState", "Partition", "Range", "WholeMatrices"]

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

    @property
    def needs_consolidation(self) -> bool:
        """Whether the state, as a process has it, does not say how it goes together with the others'."""

    def ranges(self, name: str, numel: int) -> Sequence[Range]:
        """The runs of elements that this process updates and keeps the state of, ascending, within the ``numel``
        elements that it holds of a parameter."""

    def parts(self, name: str, layout: MatrixLayout, numel: int) -> Sequence[Sequence[MatrixPart]]:
        """What each of these runs holds of the parameter's matrices."""

    def copies(self, name: str) -> int:
        """How many processes update the same elements of a parameter as this one, itself included."""

    def take(self, name: str, whole: Tensor) -> Tensor:
        """The elements of ``ranges``, flat, from the whole parameter or something of its shape."""

    def idle(self, keys: Sequence[MatrixKey], is_zero: Tensor) -> Container[MatrixKey]:
        """The matrices without a part that is not zero, on any process.

        Args:
            keys: The matrices of this process's parts.
            is_zero: `(len(keys),)` booleans.
        """

    @property
    def ahead(self) -> int:
        """How many stages to send off before the first is computed."""

    def exchange(self, stage: int, leave_out: Container[MatrixKey]) -> Exchange:
        """How the matrices of a stage become whole in this step, but for those that take no part in it."""

    def deal(self, weights: Mapping[str, tuple[Tensor, MatrixLayout]]) -> Iterator[tuple[MatrixKey, Tensor]]:
        """Every matrix of some parameters, whole, on one of the processes, to be read.

        Args:
            weights: The parameters with their matrices, by name; the same on all processes, in the same order.
        """

    def check_gradients(self) -> None:
        """Settle which gradients take part in the step, and raise if they are not yet where they belong."""

    def describe(self) -> str:
        """How the work is shared out, in a line; empty if it is not."""

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


class WholeMatrices:
    """What is the same wherever a matrix is updated by the process that has all of it."""

    ahead = 0
    rank: int
    world_size: int

    def ranges(self, name: str, numel: int) -> Sequence[Range]:
        """All elements."""
        return [(0, numel)]

    def parts(self, name: str, layout: MatrixLayout, numel: int) -> Sequence[Sequence[MatrixPart]]:
        """Whole matrices."""
        width = layout.cols
        return [layout.parts(name, [(start // width, stop // width)]) for start, stop in self.ranges(name, numel)]

    def copies(self, name: str) -> int:
        """Nobody else updates them."""
        return 1

    def take(self, name: str, whole: Tensor) -> Tensor:
        """The elements of ``ranges``."""
        flat = whole.reshape(-1)
        return torch.cat([flat[start:stop] for start, stop in self.ranges(name, flat.numel())])

    def idle(self, keys: Sequence[MatrixKey], is_zero: Tensor) -> Container[MatrixKey]:
        """Nobody else needs to know. Waits for the device."""
        return frozenset(key for key, zero in zip(keys, is_zero.tolist(), strict=True) if zero)

    def exchange(self, stage: int, leave_out: Container[MatrixKey]) -> Exchange:
        """Nothing has to travel."""
        return InPlace()

    def deal(self, weights: Mapping[str, tuple[Tensor, MatrixLayout]]) -> Iterator[tuple[MatrixKey, Tensor]]:
        """Every process has all of them, and reads some."""
        matrices = (
            ((name, number), matrix)
            for name, (weight, layout) in weights.items()
            for number, matrix in enumerate(layout.matrices(weight))
        )
        return itertools.islice(matrices, self.rank, None, self.world_size)


class Alone(WholeMatrices):
    """One process, or replicas that each do all the work."""

    is_sharded = False
    needs_consolidation = False
    rank = 0
    world_size = 1

    def describe(self) -> str:
        """It is not."""
        return ""

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
