"""The families of logged keys: what is made of what a source has found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_muon.monitoring.iteration import iteration_steps, momentum_singular_values, outcomes, residuals
from lightning_muon.monitoring.measures import (
    participation_rank,
    quantile,
    rms,
    spectral_norm,
    spike,
    stable_rank,
    svd_entropy,
)
from lightning_muon.monitoring.sources import Measured, update_squares, weight_singular_values, weight_squares
from lightning_muon.muon import Muon

__all__ = ["FAMILIES", "OF_SPECTRA", "WATCHED", "Family", "Source", "Values"]

Source = Callable[[Muon, Sequence[Measured]], list[Tensor]]


@dataclass(frozen=True)
class Values:
    """What is logged of a parameter: its own value, and those of its matrices by number, where they are known."""

    own: float
    matrices: dict[int, float]


@dataclass(frozen=True)
class Family:
    """A logged quantity.

    Attributes:
        source: Finds one vector per parameter.
        summarize: Makes values of it; ``None`` where there is nothing to say.
    """

    source: Source
    summarize: Callable[[Measured, Tensor], Values | None]


def _rms(measured: Measured, squares: Tensor) -> Values:
    own = rms(squares.sum().item(), measured.param.numel())
    if len(squares) != len(measured.numels):  # AdamW's update is known for the parameter only
        return Values(own, {})
    pairs = zip(squares.tolist(), measured.numels, strict=True)
    return Values(own, {number: rms(square, numel) for number, (square, numel) in enumerate(pairs)})


def _of_spectrum(function: Callable[[Tensor], Tensor]) -> Callable[[Measured, Tensor], Values | None]:
    def summarize(measured: Measured, sigma: Tensor) -> Values | None:
        if not len(sigma):
            return None
        parts = enumerate(torch.split(sigma, measured.ranks))
        return _median({number: function(part).item() for number, part in parts})

    return summarize


def _of_momentum(function: Callable[[Tensor], Tensor]) -> Callable[[Measured, Tensor], Values | None]:
    """The same, for the matrices that took part in the step: no normalised spectrum is all zeros."""

    def summarize(measured: Measured, sigma: Tensor) -> Values | None:
        parts = enumerate(torch.split(sigma, measured.ranks))
        return _median({number: function(part).item() for number, part in parts if part.any()})

    return summarize


def _column(column: int) -> Callable[[Measured, Tensor], Values | None]:
    """A column of a table of the matrices, whose last says whether a matrix took part in the step."""

    def summarize(measured: Measured, table: Tensor) -> Values | None:
        rows = enumerate(table.reshape(len(measured.ranks), -1).tolist() if len(table) else [])
        return _median({number: row[column] for number, row in rows if row[-1]})

    return summarize


def _median(values: dict[int, float]) -> Values | None:
    if not values:
        return None
    return Values(torch.tensor(list(values.values()), dtype=torch.float64).median().item(), values)


FAMILIES = {
    "update_rms": Family(update_squares, _rms),
    "weight_rms": Family(weight_squares, _rms),
    "weight_spectral_norm": Family(weight_singular_values, _of_spectrum(spectral_norm)),
    "weight_stable_rank": Family(weight_singular_values, _of_spectrum(stable_rank)),
    "weight_svd_entropy": Family(weight_singular_values, _of_spectrum(svd_entropy)),
    **{
        f"momentum_q{percent}": Family(momentum_singular_values, _of_momentum(partial(quantile, percent=percent)))
        for percent in (10, 25, 50, 75, 90, 95)
    },
    "momentum_participation_rank": Family(momentum_singular_values, _of_momentum(participation_rank)),
    "momentum_spike": Family(momentum_singular_values, _of_momentum(spike)),
    "ns_fail_frac": Family(outcomes, _column(0)),
    "ns_descent_kept": Family(outcomes, _column(1)),
    "ns_residual": Family(residuals, _column(0)),
    "ns_steps": Family(iteration_steps, _column(0)),
}
OF_SPECTRA = frozenset(name for name, one in FAMILIES.items() if one.source in (momentum_singular_values, outcomes))
"""What needs the singular values that ``Muon.watch_next_step(spectra=)`` asks for."""

WATCHED = OF_SPECTRA | {"ns_residual"}
"""What needs ``Muon.watch_next_step``."""
