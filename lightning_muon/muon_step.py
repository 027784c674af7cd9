"""One Muon step over the matrices of a stage: momentum, each matrix orthogonalised by its owner, the update applied."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_muon.alignment import Alignments
from lightning_muon.choosing import Chooser, Treatment
from lightning_muon.exchange import Exchange
from lightning_muon.matrices import MatrixKey, MatrixPart
from lightning_muon.orthogonalize import PolynomialSequence, Probe, orthogonalize_batch
from lightning_muon.owned import OwnedParameter, Run
from lightning_muon.updates import apply_updates_, momentum_, update_scale

__all__ = ["HeldMatrices", "MatrixOptions", "MuonStage", "UpdateRecord", "zero_gradients"]

# One batch is stacked from copies; this bounds them (256 MiB in float32) however many experts a model has.
_MAX_BATCH_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class MatrixOptions:
    """What there is to know about the matrices of a parameter, for whoever owns one.

    Attributes:
        group: The parameter group.
        transposed: Whether they are stored ``(in, out)``.
        treatment: How they are orthogonalised.
    """

    group: Mapping[str, Any]
    transposed: bool
    treatment: Treatment

    def scale(self, shape: Sequence[int]) -> float:
        """The factor on the orthogonal update of a matrix."""
        rows, cols = reversed(shape) if self.transposed else shape
        return update_scale(self.group["scale"], rows, cols)


@dataclass(frozen=True)
class HeldMatrices:
    """A parameter with a gradient, and what this process holds of its matrices.

    Attributes:
        parameter: The parameter.
        parts: The parts in each of its runs.
    """

    parameter: OwnedParameter
    parts: Sequence[Sequence[MatrixPart]]


@dataclass(frozen=True)
class _MovingPart:
    """A part about to be updated.

    Attributes:
        part: Which.
        weight: Its view of the parameter.
        momentum: Its view of the momentum.
        gradient: Its view of the gradient; negated where the optimizer ascends.
    """

    part: MatrixPart
    weight: Tensor
    momentum: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class UpdateRecord:
    """What a batch's updates were, without a copy of them.

    Attributes:
        keys: The matrices.
        square_sums: ``(len(keys),)``, ``Σ (scale·update)²`` of each: the applied step before decay and the
            learning rate.
        participation_ranks: ``(len(keys),)`` of what was orthogonalised, ``(Σσ²)²/Σσ⁴``; where asked for.
        residuals: ``(len(keys),)``, ``‖XXᵀ - I‖_F/√rank`` before the iteration's last step; where asked for.
        sequence: What was applied; ``None`` is the exact polar factor.
    """

    keys: tuple[MatrixKey, ...]
    square_sums: Tensor
    participation_ranks: Tensor | None
    residuals: Tensor | None
    sequence: PolynomialSequence | None


def zero_gradients(held: Iterable[HeldMatrices]) -> tuple[list[MatrixKey], Tensor]:
    """The matrices that this process holds a part of, and for each part whether its gradient is exactly zero.

    Returns:
        The keys, and ``(len(keys),)`` booleans.
    """
    keys, gradients = [], []
    for matrices in held:
        for run, parts in zip(matrices.parameter.runs(), matrices.parts, strict=True):
            for part in parts:
                keys.append(part.key)
                gradients.append(part.view(run.gradient))
    if not keys:
        return [], torch.ones(0, dtype=torch.bool)
    largest = torch._foreach_norm(gradients, ord=math.inf)  # NaN is not 0
    dtypes = {norm.dtype for norm in largest}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float64
    return keys, torch.stack([norm.to(largest[0].device, dtype) for norm in largest]) == 0


class MuonStage:
    """The matrices of one stage on their way through a step: to be made, then ``orthogonalize``, then ``finish``.

    The parts travel to the owners of their matrices from the time this is made until ``orthogonalize``, and the
    updates back until ``finish``; whoever has several stages can compute one while others travel.

    Args:
        held: What this process holds of the stage's parameters.
        options: Of all parameters of the stage, by name.
        exchange: How the parts become matrices.
        idle: Matrices to leave alone, momentum and weight.
        alignments: Takes in the inner products of gradients, momenta and updates.
    """

    def __init__(
        self,
        held: Iterable[HeldMatrices],
        options: Mapping[str, MatrixOptions],
        exchange: Exchange,
        idle: Container[MatrixKey],
        alignments: Alignments | None = None,
    ) -> None:
        self._options, self._exchange, self._alignments = options, exchange, alignments
        self._runs: list[tuple[OwnedParameter, list[Run]]] = []
        self._moving: list[_MovingPart] = []
        fed: list[tuple[MatrixPart, Tensor]] = []
        for matrices in held:
            runs = matrices.parameter.runs()
            self._runs.append((matrices.parameter, runs))
            for moving, values in _advance_momentum(matrices, runs, idle):
                self._moving.append(moving)
                fed.append((moving.part, values.reshape(moving.part.size)))
        exchange.gather(fed)  # which keeps them only as long as it needs them

    def orthogonalize(self, chooser: Chooser, with_telemetry: bool = False) -> list[UpdateRecord]:
        """Orthogonalise the matrices that this process owns, and start to send the updates back.

        Args:
            chooser: Says by which sequence.
            with_telemetry: Whether the records have what the iteration's own products say.

        Returns:
            What the updates were.
        """
        matrices = self._exchange.matrices()
        records = []
        for keys, sequence in self._batches(matrices, chooser.sequences(matrices)):
            probe = Probe() if with_telemetry and sequence is not None else None
            stack = torch.stack([_wide(matrices[key]) for key in keys])
            updates = orthogonalize_batch(stack, sequence, self._options[keys[0][0]].treatment.dtype, probe)
            shaped = zip(keys, updates, strict=True)
            back = {key: update if matrices[key].shape == update.shape else update.mT for key, update in shaped}
            self._apply(self._exchange.give_back(back))
            scales = [self._options[name].scale(matrices[name, number].shape) for name, number in keys]
            norms = torch.linalg.vector_norm(updates, dim=(-2, -1))
            # a tensor of several would wait for the device
            squares = (norms * (scales[0] if len(set(scales)) == 1 else norms.new_tensor(scales))).square()
            participation_ranks, residuals = (None, None) if probe is None else probe.collected()
            records.append(UpdateRecord(tuple(keys), squares, participation_ranks, residuals, sequence))
        self._apply(self._exchange.send_back())
        return records

    def finish(self) -> None:
        """Apply the updates that have travelled: the parameters have their new weights."""
        self._apply(self._exchange.returned())
        for parameter, runs in self._runs:
            parameter.write_back(runs)

    def _apply(self, updates: Iterable[tuple[int, Tensor]]) -> None:
        alike: dict[tuple[Any, ...], list[tuple[_MovingPart, Tensor]]] = {}
        for number, update in updates:
            moving = self._moving[number]
            update = update.view(moving.part.extents)
            options = self._options[moving.part.key[0]]
            group = options.group
            how = (float(group["lr"]), group["weight_decay"], options.scale(moving.part.shape))
            alike.setdefault((*how, update.dtype, update.device), []).append((moving, update))
        for (lr, weight_decay, scale, *_), pairs in alike.items():
            moved, values = [moving for moving, _ in pairs], [update for _, update in pairs]
            if self._alignments is not None:
                keys, momenta = [one.part.key for one in moved], [one.momentum for one in moved]
                self._alignments.add(keys, [one.gradient for one in moved], momenta, values)
            apply_updates_([one.weight for one in moved], values, lr=lr, weight_decay=weight_decay, scale=scale)

    def _batches(
        self, matrices: Mapping[MatrixKey, Tensor], sequences: Mapping[MatrixKey, PolynomialSequence | None]
    ) -> Iterator[tuple[Sequence[MatrixKey], PolynomialSequence | None]]:
        """Same shapes together, a tall matrix with the wide ones, as far as they are treated alike."""
        buckets: dict[tuple[Any, ...], list[MatrixKey]] = {}
        for key, matrix in matrices.items():
            treated = (sequences[key], self._options[key[0]].treatment.dtype)
            buckets.setdefault((*sorted(matrix.shape), matrix.dtype, matrix.device, *treated), []).append(key)
        for (short, long, *_), keys in buckets.items():
            size = max(1, _MAX_BATCH_ELEMENTS // (short * long))
            for first in range(0, len(keys), size):
                yield keys[first : first + size], sequences[keys[0]]


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _advance_momentum(
    matrices: HeldMatrices, runs: Sequence[Run], idle: Container[MatrixKey]
) -> Iterator[tuple[_MovingPart, Tensor]]:
    """Advance the momentum of the held parts, and give each with its piece of what is orthogonalised, float32 at
    least."""
    group = matrices.parameter.group
    moving = []
    for run, parts in zip(runs, matrices.parts, strict=True):
        momentum, gradient = run.state["momentum_buffer"], run.gradient.neg() if group["maximize"] else run.gradient
        moving += [
            _MovingPart(part, part.view(run.weight), part.view(momentum), part.view(gradient))
            for part in parts
            if part.key not in idle
        ]
    if moving:
        buffers, gradients = [one.momentum for one in moving], [one.gradient for one in moving]
        yield from zip(moving, momentum_(buffers, gradients, group["momentum"], group["nesterov"]), strict=True)
