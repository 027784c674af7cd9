"""One Muon step over the matrices a process owns: batch those of one shape, orthogonalise, apply."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_muon.matrices import MatrixBlock, MatrixLayout
from lightning_muon.orthogonalize import orthogonalize
from lightning_muon.owned import OwnedParameter, Run
from lightning_muon.updates import apply_update_, momentum_, update_scale

__all__ = ["MatrixKey", "UpdateRecord", "idle_matrices", "step_muon"]

MatrixKey = tuple[str, int]

# One batch is stacked from copies; this bounds them (256 MiB in float32) however many experts a model has.
_MAX_BATCH_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class _OwnedMatrix:
    """A matrix about to be updated.

    Attributes:
        key: Parameter name, and number of the matrix within the parameter.
        weight: ``(rows, cols)`` view of the parameter.
        fed: ``(rows, cols)``, what is orthogonalised; float32 at least.
        group: The parameter group.
        scale: The factor on the orthogonal update.
    """

    key: MatrixKey
    weight: Tensor
    fed: Tensor
    group: Mapping[str, Any]
    scale: float


@dataclass(frozen=True)
class UpdateRecord:
    """What a batch's updates were, without a copy of them.

    Attributes:
        keys: The matrices.
        square_sums: ``(len(keys),)``, ``Σ (scale·update)²`` of each: the applied step before decay and the
            learning rate.
    """

    keys: tuple[MatrixKey, ...]
    square_sums: Tensor


def step_muon(
    owned: Iterable[tuple[OwnedParameter, MatrixLayout]], idle: Container[MatrixKey] = ()
) -> list[UpdateRecord]:
    """Update the owned matrices of all parameters.

    Args:
        owned: Parameters with their matrices; a parameter's ranges hold whole blocks of its layout.
        idle: Matrices to leave alone, momentum and weight.

    Returns:
        What the updates were.
    """
    matrices: list[_OwnedMatrix] = []
    runs_of = []
    for parameter, layout in owned:
        runs = parameter.runs()
        runs_of.append((parameter, runs))
        matrices += _advance_momentum(parameter, layout, runs, idle)
    records = _update(matrices)
    for parameter, runs in runs_of:
        parameter.write_back(runs)
    return records


def idle_matrices(owned: Iterable[tuple[OwnedParameter, MatrixLayout]]) -> frozenset[MatrixKey]:
    """The matrices whose gradient is exactly zero. Waits for the device, once."""
    keys, any_gradient = [], []
    for parameter, layout in owned:
        gradient = parameter.flat_gradient()
        for start, stop in parameter.ranges:
            for key, block, place in _matrices_of(parameter.name, layout, start, stop):
                keys.append(key)
                any_gradient.append(block.views(gradient)[place].any())
    if not keys:
        return frozenset()
    is_active = torch.stack([flag.to(any_gradient[0].device) for flag in any_gradient]).tolist()
    return frozenset(key for key, active in zip(keys, is_active, strict=True) if not active)


def _matrices_of(
    name: str, layout: MatrixLayout, start: int, stop: int
) -> Iterator[tuple[MatrixKey, MatrixBlock, int]]:
    """Key of every matrix in a run of elements, the block that holds it, and its place in the block."""
    for block in layout.blocks():
        if start <= block.start < stop:
            for place in range(len(block.cuts)):
                yield (name, block.index + place), block, place


def _advance_momentum(
    parameter: OwnedParameter, layout: MatrixLayout, runs: Sequence[Run], idle: Container[MatrixKey]
) -> Iterator[_OwnedMatrix]:
    """Advance the momentum of the owned matrices and yield what is to be orthogonalised."""
    group = parameter.group
    for run in runs:
        gradient = run.gradient.neg() if group["maximize"] else run.gradient
        for key, block, place in _matrices_of(parameter.name, layout, run.start, run.stop):
            if key in idle:
                continue
            weight, own, buffer = (
                block.views(flat, run.start)[place] for flat in (run.weight, gradient, run.state["momentum_buffer"])
            )
            fed = momentum_(buffer, own, group["momentum"], group["nesterov"])
            rows, cols = reversed(weight.shape) if layout.transposed else weight.shape
            yield _OwnedMatrix(key, weight, fed, group, update_scale(group["scale"], rows, cols))


def _update(matrices: Iterable[_OwnedMatrix]) -> list[UpdateRecord]:
    """Orthogonalise and apply, same shapes batched; a tall matrix joins the wide ones transposed."""
    buckets: dict[tuple[Any, ...], list[_OwnedMatrix]] = {}
    for matrix in matrices:
        group = matrix.group
        short, long = sorted(matrix.fed.shape)
        settings = (group["orthogonalization"], group["orthogonalization_dtype"])
        key = (short, long, matrix.fed.dtype, matrix.fed.device, *settings)
        buckets.setdefault(key, []).append(matrix)
    records = []
    for (short, long, *_), bucket in buckets.items():
        size = max(1, _MAX_BATCH_ELEMENTS // (short * long))
        for first in range(0, len(bucket), size):
            records.append(_update_batch(bucket[first : first + size]))
    return records


def _update_batch(batch: list[_OwnedMatrix]) -> UpdateRecord:
    group = batch[0].group
    updates = orthogonalize(
        torch.stack([_wide(matrix.fed) for matrix in batch]),
        group["orthogonalization"],
        dtype=group["orthogonalization_dtype"],
    )
    for matrix, update in zip(batch, updates.unbind(), strict=True):
        apply_update_(
            matrix.weight,
            update if matrix.weight.shape == update.shape else update.mT,
            lr=matrix.group["lr"],
            weight_decay=matrix.group["weight_decay"],
            scale=matrix.scale,
        )
    scales = torch.tensor([matrix.scale for matrix in batch], dtype=updates.dtype, device=updates.device)
    norms = torch.linalg.vector_norm(updates, dim=(-2, -1))
    return UpdateRecord(tuple(matrix.key for matrix in batch), (norms * scales).square())


def _wide(x: Tensor) -> Tensor:
    return x if x.shape[0] <= x.shape[1] else x.mT
