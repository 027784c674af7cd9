"""What of the measured is trouble: the thresholds, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muon.monitoring.alarms import Finding
from lightning_muon.monitoring.bounds import WeightBounds, full_updates, highest_output, is_exact
from lightning_muon.monitoring.families import Source
from lightning_muon.monitoring.iteration import alignments, outcomes, residuals
from lightning_muon.monitoring.sources import Measured, update_squares, weight_spectral_norms
from lightning_muon.orthogonalize import noise_floor

__all__ = ["NOT_FINITE", "Judge", "judges"]

NOT_FINITE = "not_finite"
"""The kind of the alarm that takes the place of all others."""

# what rounding may add to a residual and to an update
_TOLERANCE = 1.1
# of an update with all directions at 1; one direction of sixteen gives this much. Experts with few tokens have a third.
_LEAST_UPDATE = 0.25
_PATIENCE = 3
_NOT_FINITE = (
    "its weight, its update or what Newton–Schulz made of it is NaN or infinite. Either the loss was (Muon's"
    " nonfinite='raise' stops there), or the iteration has left the range of its precision: then"
    " orthogonalization_dtype=torch.float32 helps."
)
# share of the directions that fail, from which on the median is one of them
_MEDIAN = 0.5
# what rounding may add to a bound on weights
_BOUND_TOLERANCE = 1.02


@dataclass(frozen=True)
class Judge:
    """One alarm.

    Attributes:
        kind: Its name in ``muon/alarms/<kind>``.
        family: It is judged where this is logged.
        source: What it looks at, which the family looks at as well.
        trouble: From a parameter and its vector to what is wrong; empty if all is well, ``None`` if there is nothing to
            judge.
        patience: In how many measurements in a row it must be found: the first steps of a training have a momentum of
            low rank.
    """

    kind: str
    family: str
    source: Source
    trouble: Callable[[Measured, Tensor], str | None]
    patience: int = 1

    def finding(self, measured: Measured, vector: Tensor) -> Finding | None:
        """What it has to say of a parameter; but for what is not finite, of one that Muon trains."""
        if not vector.numel():
            return None
        if not vector.isfinite().all():
            return Finding(NOT_FINITE, measured.name, _NOT_FINITE)
        if measured.group["algorithm"] != "muon":
            return None
        trouble = self.trouble(measured, vector)
        return None if trouble is None else Finding(self.kind, measured.name, trouble or None, self.patience)


def judges(bounds: WeightBounds) -> Sequence[Judge]:
    """All alarms on weights and updates.

    Args:
        bounds: What is known of the weights so far; each judgement adds to it.
    """

    def weight(measured: Measured, norms: Tensor) -> str | None:
        return _weight_norm(measured, bounds.exceeded(measured, norms, _BOUND_TOLERANCE))

    return (
        Judge("ns_residual", "ns_residual", residuals, _residual),
        Judge("update_above_band", "update_rms", update_squares, _update_above),
        Judge("update_below_band", "update_rms", update_squares, _update_below, _PATIENCE),
        Judge("failure_zone", "ns_fail_frac", outcomes, _failure_zone, _PATIENCE),
        Judge("moves_without_gradient", "update_gradient_cosine", alignments, _moves_without_gradient),
        Judge("weight_norm", "weight_spectral_norm", weight_spectral_norms, weight),
    )


def _rows(measured: Measured, table: Tensor) -> Mapping[int, list[float]]:
    """Of the matrices that took part in the step."""
    rows = table.reshape(len(measured.ranks), -1).tolist()
    return {number: row for number, row in enumerate(rows) if row[-1]}


def _which(measured: Measured, number: int) -> str:
    return f"matrix {number} of {len(measured.ranks)}: " if len(measured.ranks) > 1 else ""


def _residual(measured: Measured, table: Tensor) -> str | None:
    """Newton–Schulz has left its range."""
    rows = _rows(measured, table)
    if not rows:
        return None
    broken = {n: row for n, row in rows.items() if row[0] > _TOLERANCE * row[1]}
    if not broken:
        return ""
    number = max(broken, key=lambda n: broken[n][0] / broken[n][1])
    residual, promise, *_ = broken[number]
    return (
        f"{_which(measured, number)}before the last step of Newton–Schulz the residual ‖XXᵀ-I‖_F/√rank is"
        f" {residual:.4g}, and its polynomial sequence allows {promise:.4g} at most: rounding has carried singular"
        " values out of the range that it is made for, and the update is not to be trusted. Give Muon"
        " orthogonalization_dtype=torch.float32, or a sequence with more head-room, such as"
        " orthogonalization={'name': 'polar_express', 'steps': 5, 'lower': 1e-3, 'safety': 1.05}."
    )


def _update_above(measured: Measured, squares: Tensor) -> str | None:
    """The update is larger than the coefficients can make it."""
    sizes = _relative_sizes(measured, squares)
    if not sizes:
        return None
    highest = highest_output(measured.group)
    number = max(sizes, key=lambda n: sizes[n])
    if sizes[number] <= _TOLERANCE * highest:
        return ""
    return (
        f"{_which(measured, number)}the update's RMS is {sizes[number] * full_updates(measured)[number]:.4g},"
        f" {sizes[number]:.3g} times that of an orthogonal matrix, and the polynomial sequence allows {highest:.3g}"
        " times: rounding has carried singular values out of its range. Give Muon"
        " orthogonalization_dtype=torch.float32, or a sequence with more head-room."
    )


def _update_below(measured: Measured, squares: Tensor) -> str | None:
    """Most directions are missing from the update."""
    sizes = _relative_sizes(measured, squares)
    if not sizes:
        return None
    number = min(sizes, key=lambda n: sizes[n])
    if not sizes[number] < _LEAST_UPDATE:
        return ""
    return (
        f"{_which(measured, number)}the update's RMS is {sizes[number] * full_updates(measured)[number]:.4g},"
        f" {sizes[number]:.0%} of that of an orthogonal matrix, and has been that small for {_PATIENCE} measurements:"
        " fifteen of sixteen of the momentum's directions or more are missing. Either the gradient has a low rank (few"
        " tokens, a dead input), or the iteration is too short for its spectrum: MomentumSpectrumMonitor tells"
        " (muon/momentum_q50, muon/ns_fail_frac); orthogonalization='auto' or 'polar_express8' lifts more."
    )


def _relative_sizes(measured: Measured, squares: Tensor) -> dict[int, float]:
    """The RMS of the matrices' updates, as far as they moved, in units of one with all singular values at 1."""
    found = zip(squares[::2].tolist(), measured.numels, full_updates(measured), strict=True)
    return {
        number: math.sqrt(square / numel) / full for number, (square, numel, full) in enumerate(found) if square != 0
    }


def _failure_zone(measured: Measured, table: Tensor) -> str | None:
    """The median direction is all but missing from the update, and is more than what rounding leaves of none."""
    rows = _rows(measured, table)
    if not rows or is_exact(measured.group):
        return None
    liftable = {n: row for n, row in rows.items() if row[3] > noise_floor(*measured.shapes[n], torch.float32)}
    number = max(liftable, key=lambda n: liftable[n][0], default=None)
    if number is None or liftable[number][0] < _MEDIAN:
        return ""
    share = liftable[number][0]
    return (
        f"{_which(measured, number)}{share:.0%} of the momentum's singular values end below 0.1, the median among them:"
        " the iteration is too short for this spectrum. Give these layers orthogonalization='auto' or"
        " 'polar_express8'; `lightning-muon advise` on these logs says how many steps they need."
    )


def _moves_without_gradient(measured: Measured, table: Tensor) -> str | None:
    """A starved expert: Newton–Schulz gives what is left of its momentum full size."""
    rows = _rows(measured, table)
    if not rows:
        return None
    moving = [number for number, row in rows.items() if row[0] == 0 and row[3] > 0]
    if not moving:
        return ""
    which = ", ".join(map(str, moving[:5])) + (", …" if len(moving) > 5 else "")
    return (
        f"matrices {which} of {len(measured.ranks)} got a gradient of zeros and moved all the same, as far as ever, in"
        " the direction of old gradients: Newton–Schulz gives every momentum full size. For experts without tokens use"
        " Muon(idle_matrices='skip')."
    )


def _weight_norm(measured: Measured, exceeded: tuple[int, float, float] | None) -> str:
    if exceeded is None:
        return ""
    number, norm, bound = exceeded
    return (
        f"{_which(measured, number)}the weight's largest singular value is {norm:.4g}, above the"
        f" {bound:.4g} that weight decay and the size of the updates allow, ‖W‖₂ <= max(‖W₀‖₂, h·scale/λ): it was"
        " changed by something else than the optimizer's steps, or its updates are larger than their coefficients"
        " promise (muon/update_rms, muon/ns_residual)."
    )
