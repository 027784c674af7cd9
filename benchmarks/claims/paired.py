"""What paired seeds say: differences of two arms that differ in one thing, and Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_muon.scaling.student import t_within


@dataclass(frozen=True)
class Spread:
    """Attributes:
    mean: Of the values.
    sd: Their sample standard deviation; ``None`` of a single value.
    """

    mean: float
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, digits: int = 3) -> str:
        """``mean ± sd``."""
        return f"{self.mean:.{digits}f}" + ("" if self.sd is None else f" ± {self.sd:.{digits}f}")


@dataclass(frozen=True)
class Paired:
    """Differences ``a - b`` over paired seeds.

    Attributes:
        differences: By seed.
        mean: Of the differences.
        sd: Their sample standard deviation; ``None`` of a single one, like what follows from it.
        standard_error: ``sd/√n``.
        t: ``mean/standard_error``.
        p_below: P(T ≤ t) for n - 1 degrees of freedom: the one-sided test's p of "a is below b".
        seeds_below: How many differences are below zero.
        seeds_above: How many are above.
    """

    differences: dict[int, float]
    mean: float
    sd: float | None
    standard_error: float | None
    t: float | None
    p_below: float | None
    seeds_below: int
    seeds_above: int

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Paired:
    """Compares two arms, seed by seed.

    Args:
        a: A value for each seed.
        b: The same of the other arm, for the same seeds.

    Raises:
        ValueError: The seeds differ, there are none, or a value is not finite: a run that diverged has no difference.
    """
    if a.keys() != b.keys() or not a:
        raise ValueError(f"paired: both arms need the same seeds, at least one; got {sorted(a)} and {sorted(b)}")
    differences = {seed: a[seed] - b[seed] for seed in a}
    if not all(map(math.isfinite, differences.values())):
        raise ValueError(f"paired: a difference is not finite: {differences}; a diverged run cannot be paired")
    mean, number = statistics.fmean(differences.values()), len(differences)
    below, above = (sum(sign * one < 0 for one in differences.values()) for sign in (1, -1))
    if number == 1:
        return Paired(differences, mean, None, None, None, None, below, above)
    sd = statistics.stdev(differences.values())
    error = sd / math.sqrt(number)
    if error == 0:  # all equal: nothing to divide by
        return Paired(differences, mean, sd, error, None, None, below, above)
    return Paired(differences, mean, sd, error, mean / error, p_below(mean / error, number - 1), below, above)


def p_below(t: float, degrees: int) -> float:
    """P(T ≤ t) of Student's t with so many degrees of freedom."""
    half = t_within(abs(t), degrees) / 2
    return 0.5 + half if t > 0 else 0.5 - half
