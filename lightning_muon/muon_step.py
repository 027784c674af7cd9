"""One Muon step over the matrices a process owns: batch those of one shape, orthogonalise, apply."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_muon.matrices import MatrixLayout
from lightning_muon.orthogonalize import orthogonalize
from lightning_muon.owned import OwnedParameter
from lightning_muon.updates import apply_update_, momentum_, update_scale

__all__ = ["MatrixKey", "UpdateRecord", "step_muon"]

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


def step_muon(owned: Iterable[tuple[OwnedParameter, MatrixLayout]]) -> list[UpdateRecord]:
    """Update the owned matrices of all parameters.

    Args:
        owned: Parameters with their matrices; a parameter's ranges hold whole blocks of its layout.

    Returns:
        What the updates were.
    """
    matrices: list[_OwnedMatrix] = []
    weights = []
    for parameter, layout in owned:
        weight, gradient = parameter.flat()
        weights.append((parameter, weight))
        matrices += _advance_momentum(parameter, layout, weight, gradient)
    records = _update(matrices)
    for parameter, weight in weights:
        parameter.write_back(weight)
    return records


def _advance_momentum(
    parameter: OwnedParameter, layout: MatrixLayout, weight: Tensor, gradient: Tensor
) -> Iterator[_OwnedMatrix]:
    """Advance the momentum of the owned ranges and yield their matrices. ``weight``, ``gradient``: ``(numel,)``."""
    group, buffer = parameter.group, parameter.state["momentum_buffer"].view(-1)
    for start, stop, offset in parameter.runs():
        run = gradient[start:stop]
        fed = momentum_(
            buffer[offset : offset + stop - start],
            run.neg() if group["maximize"] else run,
            group["momentum"],
            group["nesterov"],
        )
        for block in layout.blocks():
            if not start <= block.start < stop:
                continue
            views = zip(block.views(weight), block.views(fed, start), strict=True)
            for number, (matrix, input_) in enumerate(views, start=block.index):
                rows, cols = reversed(matrix.shape) if layout.transposed else matrix.shape
                scale = update_scale(group["scale"], rows, cols)
                yield _OwnedMatrix((parameter.name, number), matrix, input_, group, scale)


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
