"""What each process can say of the weights and the last step: one float64 vector per parameter and source.

The sum of the vectors over the processes is the whole truth: an entry is filled by one process only, or by each
with its part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_muon.local import local
from lightning_muon.matrices import MatrixLayout
from lightning_muon.muon import Muon
from lightning_muon.orthogonalize import singular_values

__all__ = ["Measured", "measured_parameters", "update_squares", "weight_singular_values", "weight_squares"]


@dataclass(frozen=True)
class Measured:
    """A parameter, as the measures see it: its name in the logs, and the key of its matrices in the optimizer."""

    name: str
    key: str
    param: Tensor
    group: dict[str, Any]
    layout: MatrixLayout | None

    @property
    def numels(self) -> list[int]:
        """Elements of each matrix; a vector counts as one."""
        if self.layout is None:
            return [self.param.numel()]
        return [block.rows * cut for block in self.layout.blocks() for cut in block.cuts]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of each matrix, as stored; none for a vector."""
        if self.layout is None:
            return []
        return [(block.rows, cut) for block in self.layout.blocks() for cut in block.cuts]

    @property
    def ranks(self) -> list[int]:
        """Singular values of each matrix; none for a vector."""
        return [min(shape) for shape in self.shapes]


def measured_parameters(optimizer: Muon, names: Mapping[Tensor, str]) -> list[Measured]:
    """All parameters, ordered by name as on every other process; ``names`` says what to call them in the logs."""
    measured = [
        Measured(names.get(param, key), key, param, group, optimizer.routes[key].layout)
        for group in optimizer.param_groups
        for key, param in zip(group["param_names"], group["params"], strict=True)
    ]
    return sorted(measured, key=lambda one: one.key)


def update_squares(optimizer: Muon, wanted: Sequence[Measured]) -> list[Tensor]:
    """``Σ update²`` of the last step, before decay and learning rate: per matrix for Muon, per parameter for AdamW."""
    squares = {
        key: value
        for record in optimizer.update_records
        for key, value in zip(record.keys, record.square_sums, strict=True)
    }
    vectors = []
    for measured in wanted:
        if measured.group["algorithm"] == "muon":
            count = len(measured.numels)
            vector = _zeros(measured, count)
            for number in range(count):
                if (measured.key, number) in squares:
                    vector[number] = squares[measured.key, number]
        else:
            own = _adamw_update_squares(optimizer, measured)
            vector = _zeros(measured, 1) + own / optimizer.partition.copies(measured.key)
        vectors.append(vector)
    return vectors


def _adamw_update_squares(optimizer: Muon, measured: Measured) -> Tensor | float:
    """AdamW's ``m̂ / (√v̂ + ε)`` follows from its state, on the elements this process owns."""
    state = optimizer.state[measured.param]
    step = float(state.get("step", 0))
    if not step:
        return 0.0
    beta1, beta2 = measured.group["momentum"], measured.group["betas"][1]
    mean = local(state["exp_avg"]).double() / (1 - beta1**step)
    root = (local(state["exp_avg_sq"]).double() / (1 - beta2**step)).sqrt()
    update: Tensor = mean / (root + measured.group["eps"])
    return update.square().sum()


def weight_squares(optimizer: Muon, wanted: Sequence[Measured]) -> list[Tensor]:
    """``Σ weight²`` per matrix; of a vector, as a whole."""
    vectors = [_zeros(measured, len(measured.numels)) for measured in wanted]
    targets = {measured.key: vector for measured, vector in zip(wanted, vectors, strict=True)}
    for (name, number), matrix in optimizer.partition.deal(_with_matrices(wanted)):
        targets[name][number] = matrix.double().square().sum()
    for measured, vector in zip(wanted, vectors, strict=True):
        if measured.layout is None:
            flat = local(measured.param).reshape(-1)
            for start, stop in optimizer.local_ranges(measured.key, measured.param):
                vector += flat[start:stop].double().square().sum() / optimizer.partition.copies(measured.key)
    return vectors


def weight_singular_values(optimizer: Muon, wanted: Sequence[Measured]) -> list[Tensor]:
    """All singular values of each matrix, matrix after matrix; empty for a vector."""
    vectors = [_zeros(measured, sum(measured.ranks)) for measured in wanted]
    targets = {m.key: torch.split(v, m.ranks) for m, v in zip(wanted, vectors, strict=True) if m.ranks}
    for (name, number), matrix in optimizer.partition.deal(_with_matrices(wanted)):
        targets[name][number].copy_(singular_values(matrix))
    return vectors


def _with_matrices(wanted: Sequence[Measured]) -> dict[str, tuple[Tensor, MatrixLayout]]:
    return {measured.key: (measured.param, measured.layout) for measured in wanted if measured.layout is not None}


def _zeros(measured: Measured, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64, device=measured.param.device)
