"""What each process can say of the last step's Newton–Schulz on the matrices that it owns; see ``sources``.

Where a figure per matrix may be missing (the matrix rested, the step was skipped), a parameter's vector is a table,
row by row, whose last column is 1 for the matrices that have the figures.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from lightning_muon.monitoring.tables import tables
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
    keys, rows = [], []
    for measured in wanted:
        for number, shape in enumerate(measured.shapes):
            key = (measured.key, number)
            if key in optimizer.momentum_spectra:
                sigma = optimizer.momentum_spectra[key]
                outputs = lifted(sigma, sequences[key], _tolerance(measured, shape, sequences[key]))
                kept, error = descent_kept(sigma, outputs), orthogonality_error(outputs)
                keys.append(key)
                rows.append(torch.stack([fail_fraction(outputs), kept, error, quantile(sigma, 50)]))
    return tables(wanted, keys, torch.stack(rows) if rows else None, 4)


def residuals(optimizer: Subject, wanted: Sequence[Measured]) -> list[Tensor]:
    """``(‖XXᵀ - I‖_F/√rank before the last step, the largest that the sequence allows, 1)`` per matrix."""
    keys: list[MatrixKey] = []
    rows = []
    for record in optimizer.update_records if optimizer.watch.last is not None else ():
        if record.residuals is not None and record.sequence is not None:
            keys += record.keys
            allowed = torch.full_like(record.residuals, promised_residual(record.sequence), dtype=torch.float64)
            rows.append(torch.stack([record.residuals.double(), allowed], dim=1))
    return tables(wanted, keys, torch.cat(rows) if rows else None, 2)


def participation_ranks(optimizer: Subject, wanted: Sequence[Measured]) -> list[Tensor]:
    """``((Σσ²)²/Σσ⁴ of what was orthogonalised, 1)`` per matrix: of its watched spectrum, where there is one, else of
    the iteration's first ``XXᵀ``, in the iteration's precision."""
    keys: list[MatrixKey] = []
    columns = []
    spectra = optimizer.momentum_spectra
    for record in optimizer.update_records if optimizer.watch.last is not None else ():
        if record.participation_ranks is not None:
            unseen = [place for place, key in enumerate(record.keys) if key not in spectra]
            keys += [record.keys[place] for place in unseen]
            columns.append(record.participation_ranks[unseen].double())
        if seen := [key for key in record.keys if key in spectra and spectra[key].any()]:
            keys += seen
            columns.append(
                torch.stack([participation_rank(spectra[key]).to(record.square_sums.device) for key in seen])
            )
    return tables(wanted, keys, torch.cat(columns)[:, None] if columns else None, 1)


def alignments(optimizer: Subject, wanted: Sequence[Measured]) -> list[Tensor]:
    """``(⟨G, G⟩, ⟨M, M⟩, ⟨G, M⟩, ⟨U, U⟩, ⟨U, G⟩, parts)`` per matrix, as ``Alignments`` has them."""
    kept = {} if optimizer.watch.alignments is None else optimizer.watch.alignments.sums
    return tables(wanted, list(kept), torch.stack(list(kept.values())) if kept else None, 5)


def iteration_steps(optimizer: Subject, wanted: Sequence[Measured]) -> list[Tensor]:
    """``(number of steps, 1)`` per matrix; the exact polar factor has none."""
    # a gradient scaler may have left out the step
    records = [one for one in optimizer.update_records if one.sequence is not None and optimizer.watch.next is None]
    counts = {key: len(record.sequence.steps) for record in records if record.sequence for key in record.keys}
    rows = torch.tensor(list(counts.values()), dtype=torch.float64)[:, None]
    return tables(wanted, list(counts), rows if counts else None, 1)


def _tolerance(measured: Measured, shape: tuple[int, int], sequence: PolynomialSequence | None) -> float:
    if sequence is not None:
        return 0.0
    dtype = torch.promote_types(measured.param.dtype, torch.float32)  # as the momentum
    return rank_tolerance(shape, torch.promote_types(dtype, measured.group["orthogonalization_dtype"] or dtype))
