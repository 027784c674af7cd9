"""Power laws by ordinary least squares of logarithms, with what is known of their uncertainty. Pure."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lightning_muon.scaling.student import t_quantile

__all__ = ["CONFIDENCE", "Estimate", "LocalSlope", "PowerLaw", "fit_power_law"]

CONFIDENCE = 0.95
_MIN_SIZES = 4
_MAX_REACH = 10.0
_MIN_SPAN = 3.0
_MIN_REACH = 0.5
_LOG_MAX = math.log(sys.float_info.max)

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with its interval of 95 % confidence, infinite where there are no more points than coefficients."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LocalSlope:
    """The slope of log y over log size between two neighbouring sizes; of several runs of a size, their mean log y."""

    smaller: float
    larger: float
    slope: float


@dataclass(frozen=True)
class PowerLaw:
    """``y = coefficient · size^(-exponent)``, fitted by ``fit_power_law``.

    Attributes:
        sizes: Of the runs, ascending.
        values: Theirs, positive.
        exponent: α, with its Student-t interval.
        coefficient: c, the law's value at size 1: often far from the data, so that its interval spans decades.
        r_squared: Share of the variance of log y that the law explains.
        residuals: log y - log of the law, per run.
        local_slopes: Between neighbouring sizes.
        curvature: Second derivative of log y by log size, from a parabola; ``None`` below 4 sizes.
    """

    sizes: tuple[float, ...]
    values: tuple[float, ...]
    exponent: Estimate
    coefficient: Estimate
    r_squared: float
    residuals: tuple[float, ...]
    local_slopes: tuple[LocalSlope, ...]
    curvature: Estimate | None

    @property
    def num_sizes(self) -> int:
        """How many different sizes the runs have."""
        return len(set(self.sizes))

    @property
    def is_curved(self) -> bool:
        """Whether the interval of the curvature leaves out 0: a straight line is then not the law of these runs."""
        return self.curvature is not None and not self.curvature.low <= 0 <= self.curvature.high

    def predict(self, size: float) -> Estimate:
        """What one more run of ``size`` would show, with the interval for such a run: the law's and its own scatter.

        The interval trusts that the law goes on as it is; ``warnings`` says what speaks against it.
        """
        x, residuals = np.log(self.sizes), np.asarray(self.residuals)
        centred = x - x.mean()
        distance = math.log(size) - x.mean()
        variance = _variance(residuals, np.log(self.values), len(x) - 2)
        error = math.sqrt(variance * (1 + 1 / len(x) + distance**2 / (centred @ centred)))
        # through the middle, where the line is known best: its value at size 1 can be beyond float64
        log_mean = float(np.log(self.values).mean()) - self.exponent.value * distance
        return _exp(_interval(log_mean, error, len(x) - 2))

    def warnings(self, target_size: float | None = None) -> list[str]:
        """What a reader of the law must know, in words; empty where nothing speaks against it.

        Args:
            target_size: Where the law is to be extrapolated to.
        """
        found = []
        if self.num_sizes < _MIN_SIZES:
            found.append(f"fitted to {self.num_sizes} sizes: with fewer than {_MIN_SIZES}, curvature cannot be seen")
        if self.sizes[-1] < _MIN_SPAN * self.sizes[0]:
            found.append(
                f"the sizes span a factor of {self.sizes[-1] / self.sizes[0]:.3g}, less than {_MIN_SPAN:g}:"
                " the exponent says little about others"
            )
        if self.is_curved:
            found.append("curved: no power law over these sizes, and what it says of others is not to be relied on")
        if target_size is not None and target_size > _MAX_REACH * self.sizes[-1]:
            found.append(
                f"extrapolated to {target_size / self.sizes[-1]:.3g} times the largest size, beyond {_MAX_REACH:g}:"
                " the interval holds only if nothing changes on the way"
            )
        if target_size is not None and target_size < _MIN_REACH * self.sizes[0]:
            found.append(
                f"extrapolated to {target_size / self.sizes[0]:.3g} times the smallest size, below {_MIN_REACH:g}:"
                " the interval holds only if nothing changes on the way"
            )
        return found


def fit_power_law(sizes: Sequence[float], values: Sequence[float]) -> PowerLaw:
    """Fit ``y = c · size^(-α)`` by ordinary least squares of log y on log size.

    Intervals are Student's t with n - 2 degrees of freedom (n - 3 for the curvature), for errors of log y that are
    independent, normal and of one size. Runs of the same size are points of their own.

    Args:
        sizes: One per run, positive; any unit.
        values: One per run, positive.

    Raises:
        ValueError: Lengths differ, a number is not positive and finite, or all runs have the same size.
    """
    if len(sizes) != len(values):
        raise ValueError(f"{len(sizes)} sizes and {len(values)} values: each run needs one of both.")
    if not all(0 < number < math.inf for number in (*sizes, *values)):
        raise ValueError("Sizes and values must be positive and finite: the law is fitted to their logarithms.")
    if len(set(sizes)) < 2:
        raise ValueError(f"A power law needs runs of at least 2 sizes, better {_MIN_SIZES}; got {len(set(sizes))}.")
    runs = sorted(zip(map(float, sizes), map(float, values), strict=True))
    x, y = (np.log(column) for column in zip(*runs, strict=True))
    centre = x.mean()
    design = np.stack([np.ones_like(x), x - centre], axis=1)
    (mean, slope), residuals, errors = _least_squares(design, y)
    # c is the line's value at log size 0, -centre away from the middle
    at_one = _interval(mean - slope * centre, math.hypot(errors[0], errors[1] * centre), len(x) - 2)
    line = _interval(-slope, errors[1], len(x) - 2)
    spread = y - y.mean()
    total = float(spread @ spread)
    return PowerLaw(
        tuple(size for size, _ in runs),
        tuple(value for _, value in runs),
        line,
        _exp(at_one),
        1 - float(residuals @ residuals) / total if total else 1.0,
        tuple(residuals.tolist()),
        _local_slopes(runs),
        _curvature(x - centre, y),
    )


def _least_squares(design: _Array, y: _Array) -> tuple[list[float], _Array, list[float]]:
    """Coefficients, residuals, and the coefficients' standard errors."""
    coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
    residuals = y - design @ coefficients
    variance = _variance(residuals, y, len(y) - design.shape[1])
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    return coefficients.tolist(), residuals, errors.tolist()


def _variance(residuals: _Array, y: _Array, degrees: int) -> float:
    """Of the scatter around a fit; at least that of float64's rounding, lest noise of 1e-16 looks like a finding."""
    rounding = 64 * float(np.finfo(np.float64).eps) * max(1.0, float(np.abs(y).max()))
    return max(float(residuals @ residuals) / max(degrees, 1), rounding**2)


def _curvature(x: _Array, y: _Array) -> Estimate | None:
    if len(np.unique(x)) < _MIN_SIZES:
        return None
    coefficients, _, errors = _least_squares(np.stack([np.ones_like(x), x, x**2], axis=1), y)
    return _interval(2 * coefficients[2], 2 * errors[2], len(x) - 3)


def _local_slopes(runs: Sequence[tuple[float, float]]) -> tuple[LocalSlope, ...]:
    logs: dict[float, list[float]] = {}
    for size, value in runs:
        logs.setdefault(size, []).append(math.log(value))
    means = [(size, sum(of_size) / len(of_size)) for size, of_size in logs.items()]
    return tuple(
        LocalSlope(smaller, larger, (above - below) / math.log(larger / smaller))
        for (smaller, below), (larger, above) in pairwise(means)
    )


def _interval(value: float, error: float, degrees: int) -> Estimate:
    half = t_quantile(CONFIDENCE, degrees) * error
    return Estimate(value, value - half, value + half)


def _exp(estimate: Estimate) -> Estimate:
    return Estimate(*(math.exp(log) if log < _LOG_MAX else math.inf for log in astuple(estimate)))
