"""How many steps the matrices of a layer type need: the rule of ``"auto"``, applied to what was logged. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_muon.advising.places import Place
from lightning_muon.logs import ParameterDescription
from lightning_muon.orthogonalize import (
    Auto,
    PolynomialSequence,
    auto_settings,
    nominal_sequence,
    orthogonalization_flops,
)

__all__ = ["Advice", "Need", "advise"]


@dataclass(frozen=True)
class Need:
    """What a run has shown of a parameter's matrices.

    Attributes:
        name: The parameter.
        place: Its layer type and depth.
        description: Its matrices, and how the run orthogonalised them.
        sigmas: By percent, the lowest quantile of the singular values that was seen, in units of the Schatten-4 norm.
        participation_rank: The lowest that was seen.
        by_step: By optimizer step, the wanted quantile in the same units, and the participation rank.
        steps_taken: How many iteration steps the run took: the fewest of any matrix, the median, and the most;
            ``None`` where it was not logged.
    """

    name: str
    place: Place
    description: ParameterDescription
    sigmas: Mapping[int, float]
    participation_rank: float
    by_step: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    steps_taken: tuple[int, int, int] | None = None

    @property
    def is_auto(self) -> bool:
        """Whether the run chose the steps by itself."""
        return auto_settings(self.description.orthogonalization) is not None

    def floor(self, auto: Auto, participation_rank: float | None = None) -> float:
        """What rounding adds to a singular value, in units of the Schatten-4 norm: the least of the shapes.

        Args:
            auto: Says what it is of the Frobenius norm.
            participation_rank: Of the matrix; the lowest if ``None``.
        """
        dtype: torch.dtype = getattr(torch, self.description.dtype)
        floors = (auto.floor((rows, cols), dtype) for rows, cols, _ in self.description.matrices)
        return min(floors) * math.pow(participation_rank or self.participation_rank, 0.25)

    def flops(self, orthogonalization: Any) -> int:
        """Of all matrices, in one optimizer step."""
        return self._flops(nominal_sequence(orthogonalization))

    def flops_of_run(self) -> int:
        """The same, as the run orthogonalised; of ``"auto"`` with the median of the steps that it took, if known."""
        auto = auto_settings(self.description.orthogonalization)
        if auto is None or self.steps_taken is None:
            return self.flops(self.description.orthogonalization)
        return self._flops(auto.sequence(self.steps_taken[1]))

    def _flops(self, sequence: PolynomialSequence | None) -> int:
        dtype = getattr(torch, self.description.dtype)
        return sum(
            count * orthogonalization_flops(rows, cols, sequence, dtype)
            for rows, cols, count in self.description.matrices
        )


@dataclass(frozen=True)
class Advice:
    """The sequence for the matrices of a layer type at a depth.

    Attributes:
        place: The layer type and depth.
        needs: Of its parameters.
        steps: How many are needed.
        over_window: The fewest and the most that single logged steps would have needed.
        lower: The smallest singular value that these bring into the band, in units of the Schatten-4 norm.
        sigma: The lowest quantile, in the same unit.
        floor: What rounding adds to a singular value, in the same unit.
        left_below: The share of the singular values that stays below the band, of the worst matrix: ``(at least, at
            most)``, as far as the logged quantiles tell.
        flops: Per optimizer step.
        flops_of_run: The same, as the run orthogonalised.
    """

    place: Place
    needs: tuple[Need, ...]
    steps: int
    over_window: tuple[int, int]
    lower: float
    sigma: float
    floor: float
    left_below: tuple[float, float]
    flops: int
    flops_of_run: int

    @property
    def orthogonalization(self) -> dict[str, Any]:
        """For ``Muon(orthogonalization=)``."""
        return sequence_of(self.steps, self.lower)


def sequence_of(steps: int, lower: float) -> dict[str, Any]:
    """What ``orthogonalization=`` takes for these steps."""
    return {"name": "polar_express", "steps": steps, "lower": lower, "norm": "schatten4"}


def advise(needs: Iterable[Need], percent: int, auto: Auto) -> list[Advice]:
    """The fewest steps that lift the wanted quantile of every matrix into the band, for each layer type and depth.

    Args:
        needs: Of the parameters.
        percent: The quantile: 95 leaves 5 % of the singular values out of account.
        auto: The band, and the most steps.

    Returns:
        In the order of the places.
    """
    by_place: dict[Place, list[Need]] = defaultdict(list)
    for need in needs:
        by_place[need.place].append(need)
    return [_advice(place, by_place[place], percent, auto) for place in sorted(by_place)]


def _advice(place: Place, needs: list[Need], percent: int, auto: Auto) -> Advice:
    hardest = max(needs, key=lambda need: auto.choose(need.sigmas[percent], need.floor(auto)))
    steps = auto.choose(hardest.sigmas[percent], hardest.floor(auto))
    lower = float(f"{auto.reach(steps):.4g}")
    return Advice(
        place,
        tuple(needs),
        steps,
        _over_window(needs, auto) or (steps, steps),
        lower,
        min(need.sigmas[percent] for need in needs),
        hardest.floor(auto),
        _left_below(needs, lower),
        sum(need.flops(sequence_of(steps, lower)) for need in needs),
        sum(need.flops_of_run() for need in needs),
    )


def _over_window(needs: list[Need], auto: Auto) -> tuple[int, int] | None:
    """The fewest and the most steps of single logged steps, at each of which the neediest matrix decides."""
    by_step: dict[int, int] = {}
    for need in needs:
        for step, (sigma, rank) in need.by_step.items():
            by_step[step] = max(by_step.get(step, 0), auto.choose(sigma, need.floor(auto, rank)))
    return (min(by_step.values()), max(by_step.values())) if by_step else None


def _left_below(needs: list[Need], lower: float) -> tuple[float, float]:
    """Between which quantiles ``lower`` lies."""
    known = {percent: min(need.sigmas[percent] for need in needs) for percent in sorted(needs[0].sigmas)}
    lifted = [percent for percent, sigma in known.items() if sigma >= lower]
    missed = [percent for percent, sigma in known.items() if sigma < lower]
    return 1 - min(missed, default=100) / 100, 1 - max(lifted, default=0) / 100
