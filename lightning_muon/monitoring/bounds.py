"""What the coefficients promise of updates, and what follows for the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from lightning_muon.matrices import MatrixLayout
from lightning_muon.monitoring.sources import Measured
from lightning_muon.orthogonalize import auto_settings, nominal_sequence
from lightning_muon.updates import update_scale

__all__ = ["WeightBounds", "full_updates", "highest_output", "is_exact"]


def highest_output(group: Mapping[str, Any]) -> float:
    """The largest singular value that an update of this group can have, in units of its scale; exact arithmetic."""
    auto, sequence = auto_settings(group["orthogonalization"]), nominal_sequence(group["orthogonalization"])
    nominal = 1.0 if sequence is None else sequence.highest()[-1]
    return nominal if auto is None else max(nominal, 1 + auto.band)


def is_exact(group: Mapping[str, Any]) -> bool:
    """Whether the group's updates are exact polar factors, of which nothing is promised but the rank."""
    return auto_settings(group["orthogonalization"]) is None and nominal_sequence(group["orthogonalization"]) is None


def full_updates(measured: Measured) -> Sequence[float]:
    """The RMS of each matrix's update with all singular values at 1: ``scale·√(r/(rows·cols))``."""
    assert measured.layout is not None  # else it has no matrices
    return _full_updates(measured.layout, measured.group["scale"])


@lru_cache(maxsize=4096)
def _full_updates(layout: MatrixLayout, scale: str) -> tuple[float, ...]:
    pairs = zip(_scales(layout, scale), layout.shapes(), strict=True)
    return tuple(factor * math.sqrt(min(rows, cols) / (rows * cols)) for factor, (rows, cols) in pairs)


@lru_cache(maxsize=4096)
def _scales(layout: MatrixLayout, scale: str) -> tuple[float, ...]:
    return tuple(update_scale(scale, *(reversed(shape) if layout.transposed else shape)) for shape in layout.shapes())


class WeightBounds:
    """How large each weight can have become: ``‖W‖₂ <= max(‖W₀‖₂, h·scale/λ)``.

    A step ``W ← (1 - lr·λ)W - lr·scale·O`` with ``‖O‖₂ <= h`` takes a norm below ``h·scale/λ`` to one below it, and one
    above to a smaller one, for ``lr·λ <= 1``. So the bound holds from any moment on, with the norm at that moment for
    ``‖W₀‖₂``: the first measurement, also of a resumed run. λ may change: the smallest so far counts. Without weight
    decay, and once ``lr·λ`` was above 1, there is no bound.
    """

    def __init__(self) -> None:
        self._bounds: dict[tuple[str, int], float] = {}

    def exceeded(self, measured: Measured, norms: Tensor, tolerance: float) -> tuple[int, float, float] | None:
        """Take in a measurement.

        Args:
            measured: The parameter.
            norms: The largest singular value of each of its matrices.
            tolerance: By which factor a norm may be above its bound.

        Returns:
            Number, norm and bound of the matrix that is farthest above its bound; ``None`` if none is.
        """
        decay = measured.group["weight_decay"]
        highest = highest_output(measured.group)
        worst: tuple[int, float, float] | None = None
        assert measured.layout is not None  # else it has no matrices
        scales = _scales(measured.layout, measured.group["scale"])
        for number, norm in enumerate(norms.tolist()):
            limit = highest * scales[number] / decay if decay > 0 and decay * measured.rate <= 1 else math.inf
            bound = max(limit, self._bounds.get((measured.name, number), norm))
            self._bounds[measured.name, number] = bound
            if not norm <= tolerance * bound and (worst is None or norm / bound > worst[1] / worst[2]):
                worst = number, norm, bound
        return worst
