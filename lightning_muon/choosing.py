"""Which polynomial sequence each matrix gets in a step, and what is looked at on the way."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_muon.matrices import MatrixKey
from lightning_muon.orthogonalize import Auto, PolynomialSequence, default_dtype, relative_singular_values

__all__ = ["Chooser", "StepCounts", "Treatment", "describe_counts"]

_logger = logging.getLogger(__name__)
# Spectra are computed from float64 copies, four at a time; this bounds them (256 MiB).
_MAX_LOOK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Treatment:
    """How the matrices of a parameter are orthogonalised.

    Attributes:
        sequence: The sequence, or ``None`` for the exact polar factor; of no meaning where there is ``auto``.
        auto: How the number of steps is chosen for each matrix, or ``None``.
        dtype: Of the iteration; ``None`` is the device's default.
        num_matrices: How many matrices the parameter has.
    """

    sequence: PolynomialSequence | None
    auto: Auto | None
    dtype: torch.dtype | None
    num_matrices: int


@dataclass
class StepCounts:
    """How many steps the matrices of ``"auto"`` take: the same on every process, and in checkpoints.

    Attributes:
        step: Optimizer steps so far.
        looked: The last of them that looked at spectra.
        counts: For each parameter the number of each matrix; 0 where none was looked at yet.
    """

    step: int = 0
    looked: int = 0
    counts: dict[str, list[int]] = field(default_factory=dict)

    def of(self, key: MatrixKey) -> int | None:
        """The number of steps of a matrix; ``None`` before the first look."""
        name, number = key
        return self.counts[name][number] or None if name in self.counts else None

    def state(self, treatments: Mapping[str, Treatment]) -> dict[str, Any]:
        """For a checkpoint: numbers and text, zeros before the first look: the keys are always the same."""
        counts = {
            name: list(self.counts.get(name, [0] * treatment.num_matrices))
            for name, treatment in treatments.items()
            if treatment.auto is not None
        }
        return {"step": self.step, "looked": self.looked, "counts": counts}

    def load(self, state: Mapping[str, Any], treatments: Mapping[str, Treatment]) -> None:
        """Go on from a checkpoint's; parameters that are read as other matrices now begin anew."""
        self.step, self.looked = int(state.get("step", 0)), int(state.get("looked", 0))
        saved = {name: [max(0, int(count)) for count in counts] for name, counts in state.get("counts", {}).items()}
        self.counts = {
            name: [min(count, treatment.auto.most_steps) for count in saved[name]]
            for name, treatment in treatments.items()
            if treatment.auto is not None and len(saved.get(name, ())) == treatment.num_matrices and any(saved[name])
        }

    def is_due(self, treatments: Iterable[Treatment]) -> bool:
        """Whether spectra are looked at in this step."""
        return any(settings.is_due(self.step) for settings in {one.auto for one in treatments} if settings is not None)

    def adopt(self, treatments: Mapping[str, Treatment], chosen: Sequence[int]) -> int:
        """Take what all processes have found, for the matrices of ``"auto"`` in order; 0 leaves one as it was.

        Returns:
            How many matrices take another number of steps now.
        """
        found = iter(chosen)
        changed, self.looked = 0, self.step
        for name, treatment in treatments.items():
            if treatment.auto is not None:
                old = self.counts.get(name, [0] * treatment.num_matrices)
                self.counts[name] = [next(found) or count for count in old]
                changed += sum(a != b for a, b in zip(old, self.counts[name], strict=True))
        return changed

    def describe(self) -> str:
        """All counts in a line."""
        return describe_counts(count for counts in self.counts.values() for count in counts)


def describe_counts(counts: Iterable[int]) -> str:
    """``4 steps (1 matrix), 5 steps (52 matrices)``."""
    words = {0: "not looked at yet"}
    return ", ".join(
        f"{words.get(count, f'{count} steps')} ({number} {'matrix' if number == 1 else 'matrices'})"
        for count, number in sorted(Counter(counts).items())
    )


class Chooser:
    """The choices of one step on one process, made where the whole matrices are at hand.

    Args:
        treatments: Of all parameters that Muon trains, by name; the same on every process, in the same order.
        step_counts: What was chosen before.
        watched: Parameters whose spectra somebody wants to see.
    """

    def __init__(self, treatments: Mapping[str, Treatment], step_counts: StepCounts, watched: Container[str]) -> None:
        self._treatments, self._step_counts, self._watched = treatments, step_counts, watched
        self._chosen: dict[MatrixKey, int] = {}
        self.spectra: dict[MatrixKey, Tensor] = {}

    def sequences(self, matrices: Mapping[MatrixKey, Tensor]) -> dict[MatrixKey, PolynomialSequence | None]:
        """The sequence of each matrix; ``None`` is the exact polar factor.

        Where it is time, the spectra of these matrices are looked at first: ``spectra`` has those that are watched,
        descending and relative to the Frobenius norm.
        """
        due = [key for key in matrices if self._is_due(key[0])]
        looked_at = {key: matrices[key] for key in matrices if key[0] in self._watched} | {
            key: matrices[key] for key in due
        }
        spectra = dict(_spectra(looked_at))
        self.spectra |= {key: sigma for key, sigma in spectra.items() if key[0] in self._watched}
        for key in due:
            auto, matrix = self._treatments[key[0]].auto, matrices[key]
            assert auto is not None  # only those are due
            dtype = self._treatments[key[0]].dtype or default_dtype(matrix)
            rows, cols = matrix.shape
            steps = auto.steps_for(spectra[key], (rows, cols), dtype, self._step_counts.of(key))
            if steps is not None:
                self._chosen[key] = steps
        return {key: self._sequence(key) for key in matrices}

    def settled(self) -> list[int]:
        """What this process has chosen in this step, for every matrix of ``"auto"`` in order; 0 elsewhere."""
        return [
            self._chosen.get((name, number), 0)
            for name, treatment in self._treatments.items()
            if treatment.auto is not None
            for number in range(treatment.num_matrices)
        ]

    def _is_due(self, name: str) -> bool:
        auto = self._treatments[name].auto
        return auto is not None and auto.is_due(self._step_counts.step)

    def _sequence(self, key: MatrixKey) -> PolynomialSequence | None:
        treatment = self._treatments[key[0]]
        if treatment.auto is None:
            return treatment.sequence
        # one that rested at the last look gets all steps until the next, on whichever process it is
        steps = self._chosen.get(key) or self._step_counts.of(key) or treatment.auto.most_steps
        return treatment.auto.sequence(steps)


def _spectra(matrices: Mapping[MatrixKey, Tensor]) -> Iterator[tuple[MatrixKey, Tensor]]:
    """Singular values relative to the Frobenius norm, descending, on the CPU; same shapes together."""
    buckets: dict[tuple[Any, ...], list[MatrixKey]] = {}
    for key, matrix in matrices.items():
        buckets.setdefault((*sorted(matrix.shape), matrix.device), []).append(key)
    for (short, long, _), keys in buckets.items():
        size = max(1, _MAX_LOOK_ELEMENTS // (short * long))
        for first in range(0, len(keys), size):
            some = keys[first : first + size]
            wide = [matrices[key] if matrices[key].shape[0] == short else matrices[key].mT for key in some]
            try:
                sigma = relative_singular_values(torch.stack(wide)).cpu()
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                # on this process alone, and a look is not worth the training
                _logger.warning("The eigenvalues of %d matrices of %d x %d did not converge.", len(some), short, long)
                sigma = torch.full((len(some), short), torch.nan, dtype=torch.float64)
            yield from zip(some, sigma, strict=True)
