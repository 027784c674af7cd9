"""What each process can say of the weights and the last step: one float64 vector per parameter and source.

The sum of the vectors over the processes is the whole truth: an entry is filled by one process only, or by each
with its part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_muon.local import local
from lightning_muon.matrices import MatrixKey, MatrixLayout
from lightning_muon.monitoring.subject import Subject
from lightning_muon.monitoring.tables import entries
from lightning_muon.orthogonalize import singular_values, spectral_norm

__all__ = [
    "Measured",
    "measured_parameters",
    "update_squares",
    "weight_singular_values",
    "weight_spectral_norms",
    "weight_squares",
]


@dataclass(frozen=True)
class Measured:
    """A parameter, as the measures see it.

    Attributes:
        name: In the logs.
        key: The name of its matrices in the optimizer.
        param: The parameter.
        group: Its group.
        layout: Its matrices; ``None`` for a vector.
        rate: The learning rate of the last step.
    """

    name: str
    key: str
    param: Tensor
    group: dict[str, Any]
    layout: MatrixLayout | None
    rate: float

    @property
    def numels(self) -> Sequence[int]:
        """Elements of each matrix; a vector counts as one."""
        if self.layout is None:
            return (self.param.numel(),)
        return _numels(self.layout)

    @property
    def shapes(self) -> Sequence[tuple[int, int]]:
        """Rows and columns of each matrix, as stored; none for a vector."""
        return () if self.layout is None else self.layout.shapes()

    @property
    def ranks(self) -> Sequence[int]:
        """Singular values of each matrix; none for a vector."""
        return () if self.layout is None else _ranks(self.layout)


# a model of thousands of matrices is measured many times
@lru_cache(maxsize=4096)
def _numels(layout: MatrixLayout) -> tuple[int, ...]:
    return tuple(rows * cols for rows, cols in layout.shapes())


@lru_cache(maxsize=4096)
def _ranks(layout: MatrixLayout) -> tuple[int, ...]:
    return tuple(map(min, layout.shapes()))


def measured_parameters(optimizer: Subject, names: Mapping[Tensor, str]) -> list[Measured]:
    """All parameters, ordered by name as on every other process; ``names`` says what to call them in the logs."""
    rates = optimizer.watch.rates
    measured = [
        Measured(
            names.get(param, key),
            key,
            param,
            group,
            optimizer.routes[key].layout,
            rates.get(group["name"], float(group["lr"])),
        )
        for group in optimizer.param_groups
        for key, param in zip(group["param_names"], group["params"], strict=True)
    ]
    return sorted(measured, key=lambda one: one.key)


def update_squares(optimizer: Subject, wanted: Sequence[Measured]) -> list[Tensor]:
    """``(Σ update², 1)`` of the last step, before decay and learning rate: per matrix, or per parameter for our AdamW;
    ``(0, 0)`` for what took no part in it.

    Nothing if the step that was to be watched has not come: a gradient scaler has left it out.
    """
    if optimizer.watch.next is not None:
        return [_zeros(measured, 0) for measured in wanted]
    keys = [key for record in optimizer.update_records for key in record.keys]
    sums = torch.cat([record.square_sums.double() for record in optimizer.update_records]) if keys else None
    vectors = entries(wanted, keys, None if sums is None else torch.stack([sums, torch.ones_like(sums)], dim=1), 2)
    for number, measured in enumerate(wanted):
        if measured.group["algorithm"] == "adamw":
            vectors[number] = _zeros(measured, 2)
            if measured.key in optimizer.watch.moved:
                copies = optimizer.partition.copies(measured.key)
                vectors[number][0] = _adamw_update_squares(optimizer, measured) / copies
                vectors[number][1] = 1.0
    return vectors


def _adamw_update_squares(optimizer: Subject, measured: Measured) -> Tensor | float:
    """AdamW's ``m̂ / (√v̂ + ε)`` follows from its state, on the elements this process owns."""
    state = optimizer.state[measured.param]
    step = float(state.get("step", 0))
    if not step:
        return 0.0
    beta1, beta2 = measured.group["momentum"], measured.group["betas"][1]
    mean, square = (local(state[key]) for key in ("exp_avg", "exp_avg_sq"))
    wide = torch.promote_types(mean.dtype, torch.float32)
    root = (square.to(wide) / (1 - beta2**step)).sqrt_().add_(measured.group["eps"])
    norm: Tensor = torch.linalg.vector_norm(mean.to(wide) / root)
    squares: Tensor = (norm.double() / (1 - beta1**step)).square()
    return squares


def weight_squares(optimizer: Subject, wanted: Sequence[Measured]) -> list[Tensor]:
    """``Σ weight²`` per matrix; of a vector, as a whole."""
    keys: list[MatrixKey] = []
    views: list[Tensor] = []
    copies: list[int] = []
    for measured in wanted:
        flat = local(measured.param).reshape(-1)
        for key, view in _own_views(optimizer, measured, flat):
            keys.append(key)
            views.append(view)
            copies.append(optimizer.partition.copies(measured.key))
    norms = [_norms(views)] if views else []
    # AdamW's elements are shared out one by one, across the edges of matrices
    stacks = [one for one in wanted if _is_stack(one) and one.group["algorithm"] == "adamw"]
    for key, matrix in optimizer.partition.deal(_with_matrices(stacks)):
        keys.append(key)
        norms.append(_norms([matrix]))
        copies.append(1)
    squares = torch.cat(norms).square() if norms else None
    return entries(wanted, keys, squares if squares is None else squares / squares.new_tensor(copies))


def _norms(views: list[Tensor]) -> Tensor:
    """Frobenius norms, computed in float32 at least; float64."""
    wide = torch.float32 if all(view.dtype.itemsize <= 4 for view in views) else torch.float64
    return torch.stack(torch._foreach_norm(views, 2, wide)).double()


def _own_views(optimizer: Subject, measured: Measured, flat: Tensor) -> Iterator[tuple[MatrixKey, Tensor]]:
    """What this process has to say of a parameter: over all processes, each element is in one view, or in one for each
    copy."""
    ranges = optimizer.local_ranges(measured.key, measured.param)
    if measured.layout is None or not _is_stack(measured):
        yield from (((measured.key, 0), flat[start:stop]) for start, stop in ranges)
    elif measured.group["algorithm"] != "adamw":
        parts = optimizer.partition.parts(measured.key, measured.layout, flat.numel())
        for (start, stop), own in zip(ranges, parts, strict=True):
            yield from ((part.key, part.view(flat[start:stop])) for part in own)


def _is_stack(measured: Measured) -> bool:
    return len(measured.numels) > 1


def weight_spectral_norms(optimizer: Subject, wanted: Sequence[Measured]) -> list[Tensor]:
    """The largest singular value of each matrix; empty for a vector."""
    vectors = [_zeros(measured, len(measured.ranks)) for measured in wanted]
    targets = {measured.key: vector for measured, vector in zip(wanted, vectors, strict=True)}
    for (name, number), matrix in optimizer.partition.deal(_with_matrices(wanted)):
        targets[name][number] = _or_nan(spectral_norm, matrix, ())
    return vectors


def weight_singular_values(optimizer: Subject, wanted: Sequence[Measured]) -> list[Tensor]:
    """All singular values of each matrix, matrix after matrix; empty for a vector."""
    vectors = [_zeros(measured, sum(measured.ranks)) for measured in wanted]
    targets = {m.key: torch.split(v, list(m.ranks)) for m, v in zip(wanted, vectors, strict=True) if m.ranks}
    for (name, number), matrix in optimizer.partition.deal(_with_matrices(wanted)):
        targets[name][number].copy_(_or_nan(singular_values, matrix, (min(matrix.shape),)))
    return vectors


def _or_nan(measure: Callable[[Tensor], Tensor], matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An eigensolver that does not converge fails on this process alone, and the others would wait for it."""
    try:
        return measure(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return torch.full(shape, torch.nan, dtype=torch.float64, device=matrix.device)


def _with_matrices(wanted: Sequence[Measured]) -> dict[str, tuple[Tensor, MatrixLayout]]:
    return {measured.key: (measured.param, measured.layout) for measured in wanted if measured.layout is not None}


def _zeros(measured: Measured, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64, device=measured.param.device)
