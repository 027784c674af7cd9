"""What each process can say of the last step's Newton–Schulz on the matrices that it owns; see ``sources``.

Where a figure per matrix may be missing (the matrix rested, the step was skipped), a parameter's vector is a table,
row by row, whose last column is 1 for the matrices that have the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_muon.matrices import MatrixKey
from lightning_muon.monitoring.measures import (
    descent_kept,
    fail_fraction,
    lifted,
    orthogonality_error,
    participation_rank,
    promised_residual,
    quantile,
)
from lightning_muon.monitoring.sources import Measured
from lightning_muon.monitoring.subject import Subject
from lightning_muon.orthogonalize import PolynomialSequence, rank_tolerance

__all__ = ["alignments", "iteration_steps", "momentum_singular_values", "outcomes", "participation_ranks", "residuals"]


def momentum_singular_values(optimizer: Subject, wanted: Sequence[Measured]) -> list[Tensor]:
    """The singular values of what was orthogonalised, relative to its Frobenius norm, matrix after matrix."""
    vectors = []
    for measured in wanted:
        parts = [
            optimizer.momentum_spectra.get((measured.key, number), torch.zeros(rank, dtype=torch.float64))
            for number, rank in enumerate(measured.ranks)
        ]
        vector = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
        vectors.append(vector.to(measured.param.device))
    return vectors


def outcomes(optimizer: Subject, wanted: Sequence[Measured]) -> list[Tensor]:
    """``(share of σ that fail, share of the descent that is kept, distance from orthogonal, median σ, 1)`` per matrix,
    of the watched spectra."""
    sequences = {key: record.sequence for record in optimizer.update_records for key in record.keys}
    found: dict[MatrixKey, tuple[float | Tensor, ...]] = {}
    for measured in wanted:
        for number, shape in enumerate(measured.shapes):
            key = (measured.key, number)
            if key in optimizer.momentum_spectra:
                sigma = optimizer.momentum_spectra[key]
                outputs = lifted(sigma, sequences[key], _tolerance(measured, shape, sequences[key]))
                found[key] = (
                    fail_fraction(outputs),
                    descent_kept(sigma, outputs),
                    orthogonality_error(outputs),
                    quantile(sigma, 50),
                )
    return _tables(wanted, found, 4)


def residuals(optimizer: Subject, wanted: Sequence[Measured]) -> list[Tensor]:
    """``(‖XXᵀ - I‖_F/√rank before the last step, the largest that the sequence allows, 1)`` per matrix."""
    found: dict[MatrixKey, tuple[float | Tensor, ...]] = {}
    for record in optimizer.update_records if optimizer.watch.last is not None else ():
        if record.residuals is not None and record.sequence is not None:
            promise = promised_residual(record.sequence)
            found |= {key: (value, promise) for key, value in zip(record.keys, record.residuals, strict=True)}
    return _tables(wanted, found, 2)


def participation_ranks(optimizer: Subject, wanted: Sequence[Measured]) -> list[Tensor]:
    """``((Σσ²)²/Σσ⁴ of what was orthogonalised, 1)`` per matrix: of its watched spectrum, where there is one, else of
    the iteration's first ``XXᵀ``, in the iteration's precision."""
    found: dict[MatrixKey, tuple[float | Tensor, ...]] = {}
    for record in optimizer.update_records if optimizer.watch.last is not None else ():
        if record.participation_ranks is not None:
            found |= {key: (value,) for key, value in zip(record.keys, record.participation_ranks, strict=True)}
    spectra = optimizer.momentum_spectra
    known = ((measured.key, number) for measured in wanted for number in range(len(measured.ranks)))
    found |= {key: (participation_rank(spectra[key]),) for key in known if key in spectra and spectra[key].any()}
    return _tables(wanted, found, 1)


def alignments(optimizer: Subject, wanted: Sequence[Measured]) -> list[Tensor]:
    """``(⟨G, G⟩, ⟨M, M⟩, ⟨G, M⟩, ⟨U, U⟩, ⟨U, G⟩, parts)`` per matrix, as ``Alignments`` has them."""
    kept = optimizer.watch.alignments
    found = {key: tuple(sums) for key, sums in kept.sums.items()} if kept is not None else {}
    return _tables(wanted, found, 5)


def iteration_steps(optimizer: Subject, wanted: Sequence[Measured]) -> list[Tensor]:
    """``(number of steps, 1)`` per matrix; the exact polar factor has none."""
    found: dict[MatrixKey, tuple[float | Tensor, ...]] = {
        key: (float(len(record.sequence.steps)),)
        for record in optimizer.update_records
        if record.sequence is not None and optimizer.watch.next is None  # else a gradient scaler has left out the step
        for key in record.keys
    }
    return _tables(wanted, found, 1)


def _tables(
    wanted: Sequence[Measured], found: Mapping[MatrixKey, tuple[float | Tensor, ...]], columns: int
) -> list[Tensor]:
    nothing = (0.0,) * (columns + 1)
    vectors = []
    for measured in wanted:
        keys = [(measured.key, number) for number in range(len(measured.ranks))]
        rows = [(*found[key], 1.0) if key in found else nothing for key in keys]
        table = [_column(values, measured.param.device) for values in zip(*rows, strict=True)]
        vectors.append(torch.stack(table, dim=1).reshape(-1) if table else _column((), measured.param.device))
    return vectors


def _column(values: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """In few launches, however many values there are on the device."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return torch.tensor(values, dtype=torch.float64, device=device)
    zero = tensors[0].new_zeros(())
    column = torch.stack([value if isinstance(value, Tensor) else zero for value in values])
    return column.to(device, torch.float64)


def _tolerance(measured: Measured, shape: tuple[int, int], sequence: PolynomialSequence | None) -> float:
    if sequence is not None:
        return 0.0
    dtype = torch.promote_types(measured.param.dtype, torch.float32)  # as the momentum
    return rank_tolerance(shape, torch.promote_types(dtype, measured.group["orthogonalization_dtype"] or dtype))
