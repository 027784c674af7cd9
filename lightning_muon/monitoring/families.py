"""The families of logged keys: what is made of what a source has found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_muon.monitoring.iteration import (
    alignments,
    iteration_steps,
    momentum_singular_values,
    outcomes,
    participation_ranks,
    residuals,
)
from lightning_muon.monitoring.measures import (
    cosine,
    nuclear_rank,
    quantile,
    rms,
    scaled_quantile,
    spike,
    stable_rank,
    svd_entropy,
)
from lightning_muon.monitoring.sources import (
    Measured,
    update_squares,
    weight_singular_values,
    weight_spectral_norms,
    weight_squares,
)
from lightning_muon.monitoring.subject import Subject

__all__ = ["FAMILIES", "OF_ALIGNMENTS", "OF_SPECTRA", "OF_UPDATES", "WATCHED", "Family", "Source", "Values"]

Source = Callable[[Subject, Sequence[Measured]], list[Tensor]]


@dataclass(frozen=True)
class Values:
    """What is logged of a parameter: its own value, and those of its matrices by number, where they are known."""

    own: float
    matrices: dict[int, float]


@dataclass(frozen=True)
class Family:
    """A logged quantity.

    Attributes:
        sources: Each finds one vector per parameter.
        summarize: Makes values of a parameter's vectors, one from each source; ``None`` where there is nothing to say.
    """

    sources: tuple[Source, ...]
    summarize: Callable[..., Values | None]


def _rms(measured: Measured, squares: Tensor) -> Values:
    own = rms(squares.sum().item(), measured.param.numel())
    if len(squares) != len(measured.numels):  # AdamW's update is known for the parameter only
        return Values(own, {})
    pairs = zip(squares.tolist(), measured.numels, strict=True)
    return Values(own, {number: rms(square, numel) for number, (square, numel) in enumerate(pairs)})


def _update_rms(measured: Measured, updates: Tensor) -> Values | None:
    squares, moved = updates.view(-1, 2).unbind(1)
    return _rms(measured, squares) if moved.any() else None


def _update_weight_ratio(measured: Measured, updates: Tensor, weights: Tensor) -> Values | None:
    """‖ΔW‖_F/‖W‖_F of the step, decay left out."""
    squares, moved = updates.view(-1, 2).unbind(1)
    if not (moved.any() and weights.sum()):  # it took no part, or there is nothing to compare with
        return None
    own = measured.rate * math.sqrt((squares.sum() / weights.sum()).item())
    if len(squares) != len(weights):
        return Values(own, {})
    pairs = enumerate(zip(squares.tolist(), weights.tolist(), strict=True))
    return Values(own, {number: measured.rate * math.sqrt(u / w) for number, (u, w) in pairs if w})


def _of_spectrum(function: Callable[[Tensor], Tensor]) -> Callable[[Measured, Tensor], Values | None]:
    def summarize(measured: Measured, sigma: Tensor) -> Values | None:
        if not len(sigma):
            return None
        parts = enumerate(torch.split(sigma, list(measured.ranks)))
        return _median({number: function(part).item() for number, part in parts})

    return summarize


def _of_matrices(measured: Measured, values: Tensor) -> Values | None:
    return _median(dict(enumerate(values.tolist())))


def _of_momentum(function: Callable[[Tensor], Tensor]) -> Callable[[Measured, Tensor], Values | None]:
    """The same, for the matrices that took part in the step: no normalised spectrum is all zeros."""

    def summarize(measured: Measured, sigma: Tensor) -> Values | None:
        parts = enumerate(torch.split(sigma, list(measured.ranks)))
        return _median({number: function(part).item() for number, part in parts if part.any()})

    return summarize


def _column(column: int) -> Callable[[Measured, Tensor], Values | None]:
    """A column of a table of the matrices, whose last says whether a matrix took part in the step."""

    def summarize(measured: Measured, table: Tensor) -> Values | None:
        rows = enumerate(table.reshape(len(measured.ranks), -1).tolist() if len(table) else [])
        return _median({number: row[column] for number, row in rows if row[-1]})

    return summarize


def _cosine(product: int, square: int, other_square: int) -> Callable[[Measured, Tensor], Values | None]:
    """Of the columns of ``alignments`` with these numbers."""

    def summarize(measured: Measured, table: Tensor) -> Values | None:
        rows = enumerate(table.reshape(len(measured.ranks), -1).tolist() if len(table) else [])
        return _median({n: cosine(row[product], row[square], row[other_square]) for n, row in rows if row[-1]})

    return summarize


def _median(values: dict[int, float]) -> Values | None:
    if not values:
        return None
    return Values(torch.tensor(list(values.values()), dtype=torch.float64).median().item(), values)


_QUANTILES = (10, 25, 50, 75, 90)

FAMILIES = {
    "update_rms": Family((update_squares,), _update_rms),
    "update_weight_ratio": Family((update_squares, weight_squares), _update_weight_ratio),
    "weight_rms": Family((weight_squares,), _rms),
    "weight_spectral_norm": Family((weight_spectral_norms,), _of_matrices),
    "weight_stable_rank": Family((weight_singular_values,), _of_spectrum(stable_rank)),
    "weight_svd_entropy": Family((weight_singular_values,), _of_spectrum(svd_entropy)),
    **{
        f"momentum_q{percent}": Family((momentum_singular_values,), _of_momentum(partial(quantile, percent=percent)))
        for percent in (*_QUANTILES, 95)
    },
    **{
        f"momentum_scaled_q{percent}": Family(
            (momentum_singular_values,), _of_momentum(partial(scaled_quantile, percent=percent))
        )
        for percent in _QUANTILES
    },
    "momentum_participation_rank": Family((participation_ranks,), _column(0)),
    "momentum_nuclear_rank": Family((momentum_singular_values,), _of_momentum(nuclear_rank)),
    "momentum_spike": Family((momentum_singular_values,), _of_momentum(spike)),
    "ns_fail_frac": Family((outcomes,), _column(0)),
    "ns_descent_kept": Family((outcomes,), _column(1)),
    "ns_orthogonality_error": Family((outcomes,), _column(2)),
    "ns_residual": Family((residuals,), _column(0)),
    "ns_steps": Family((iteration_steps,), _column(0)),
    "gradient_momentum_cosine": Family((alignments,), _cosine(2, 0, 1)),
    "update_gradient_cosine": Family((alignments,), _cosine(4, 0, 3)),
}


def _that_need(*sources: Source) -> frozenset[str]:
    return frozenset(name for name, family in FAMILIES.items() if not set(sources).isdisjoint(family.sources))


OF_SPECTRA = _that_need(momentum_singular_values, outcomes)
"""What needs the singular values that ``Muon.watch_next_step(spectra=)`` asks for."""

OF_ALIGNMENTS = _that_need(alignments)
"""What needs ``Muon.watch_next_step(alignments=True)``."""

WATCHED = OF_SPECTRA | OF_ALIGNMENTS | _that_need(residuals, participation_ranks)
"""What needs ``Muon.watch_next_step``."""

OF_UPDATES = _that_need(update_squares)
"""What needs the size of the update."""
