"""The laws of a ladder: for JSON, and the same as a table to read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_muon.scaling.ladder import Ladder, Place, Point
from lightning_muon.scaling.law import Estimate, PowerLaw, fit_power_law
from lightning_muon.scaling.sequences import label, smallest_sequence
from lightning_muon.usage import columns

__all__ = ["Fit", "Target", "figures", "fit_ladder", "short_names", "table"]


# Rows that a warning names; of more it says how many.
_MAX_NAMES = 3


@dataclass(frozen=True)
class Target:
    """A model to extrapolate to: trained parameters and, where it is known, the rank of its matrices."""

    size: float
    rank: int | None = None


@dataclass(frozen=True)
class Fit:
    """The two laws of one place.

    Attributes:
        plain: Of σ.
        corrected: Of σ·√rank, which a matrix of noise keeps constant over widths.
    """

    place: Place
    points: Sequence[Point]
    plain: PowerLaw
    corrected: PowerLaw

    def sigma_at(self, target: Target) -> Estimate:
        """σ at the target: by the width-corrected law where the target's rank is known, else by the plain one.

        A law may pass 1, which no σ of a normalised matrix does: 1 is then the answer.
        """
        law, root = (self.plain, 1.0) if target.rank is None else (self.corrected, math.sqrt(target.rank))
        predicted = law.predict(target.size)
        return Estimate(*(min(value / root, 1.0) for value in (predicted.value, predicted.low, predicted.high)))

    def warnings(self, target: Target | None) -> list[str]:
        """What is to be known of either law."""
        size = target.size if target else None
        return list(dict.fromkeys(self.plain.warnings(size) + self.corrected.warnings(size)))


def fit_ladder(ladder: Ladder) -> tuple[list[Fit], list[str]]:
    """Fit both laws at every place that runs of two sizes have.

    Returns:
        The fits, and what could not be fitted.
    """
    fits, unfitted = [], []
    for place, points in ladder.points.items():
        sizes = [point.size for point in points]
        if len(set(sizes)) < 2:
            unfitted.append(str(place))
            continue
        plain = fit_power_law(sizes, [point.sigma for point in points])
        corrected = fit_power_law(sizes, [point.sigma * math.sqrt(point.rank) for point in points])
        fits.append(Fit(place, points, plain, corrected))
    return fits, [f"only one size has {', '.join(unfitted)}: not fitted"] if unfitted and fits else []


def figures(fits: Sequence[Fit], quantile: str, target: Target | None, warnings: Sequence[str]) -> dict[str, Any]:
    """Everything that was found, as plain numbers; what is infinite is ``None``."""
    content = {
        "quantile": quantile,
        "target": asdict(target) if target else None,
        "laws": [
            {
                "type": fit.place.type,
                "depth": fit.place.depth,
                "points": [asdict(point) for point in fit.points],
                "plain": _law(fit.plain),
                "width_corrected": _law(fit.corrected),
                "target": _at(fit, target) if target else None,
                "warnings": fit.warnings(target),
            }
            for fit in fits
        ],
        "warnings": list(warnings),
    }
    finite: dict[str, Any] = _finite(content)
    return finite


def _law(law: PowerLaw) -> dict[str, Any]:
    return {**asdict(law), "is_curved": law.is_curved}


def _at(fit: Fit, target: Target) -> dict[str, Any]:
    sigma = fit.sigma_at(target)
    return {"sigma": asdict(sigma), **_sequences(sigma)}


def _sequences(sigma: Estimate) -> dict[str, str | dict[str, Any] | None]:
    return {
        "smallest_sequence": smallest_sequence(sigma.value),
        "smallest_sequence_at_low_end": smallest_sequence(sigma.low) if sigma.low > 0 else None,
    }


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def short_names(types: Sequence[str]) -> dict[str, str]:
    """What follows the block's number, without ``.weight``; the whole name where that would not be unique."""
    short = {type_: type_.partition("*.")[2].removesuffix(".weight") or type_ for type_ in types}
    return {type_: name if list(short.values()).count(name) == 1 else type_ for type_, name in short.items()}


def table(fits: Sequence[Fit], quantile: str, target: Target | None, warnings: Sequence[str]) -> str:
    """The laws as text, and below them what is to be known of them."""
    sizes = sorted({point.size for fit in fits for point in fit.points})
    runs = {point.run for fit in fits for point in fit.points}
    names = short_names([fit.place.type for fit in fits])
    header = ["layer type", "depth", "runs", "α of σ", "α of σ·√r", "R²", "local slopes of σ", "curved"]
    if target:
        header += [
            f"σ at {target.size:.3g}" + (f", r = {target.rank}" if target.rank else ""),
            "resolved by",
            "low end",
        ]
    lines = [
        f"σ_{quantile} = c·M^(-α): {len(runs)} runs of {len(sizes)} sizes, M from {sizes[0]:,} to {sizes[-1]:,} trained"
        " parameters; intervals of 95 %",
        "",
        *columns([header, *(_row(fit, names[fit.place.type], target) for fit in fits)]),
        "",
        "r is the shorter side of the matrices; the spectrum of noise alone has σ·√r constant. Curved: which of the two"
        " laws a parabola contradicts;",
        "of straight ones, 1 in 20 is called so.",
    ]
    if target:
        law = "σ·√r" if target.rank else "σ"
        lines += [
            f"σ at the target is that of the law of {law}, with the interval for one run. Resolved by: the cheapest"
            " sequence with f(σ) ≥ 0.7, f ≤ 1.35 above;",
            "low end: the same at the low end of the interval.",
        ]
    by_text: dict[str, list[str]] = defaultdict(list)
    for fit in fits:
        for text in fit.warnings(target):
            by_text[text].append(str(Place(names[fit.place.type], fit.place.depth)))
    notes = [f"{_which(places, len(fits))}: {text}" for text, places in by_text.items()] + list(warnings)
    return "\n".join([*lines, *(["", "warnings"] if notes else []), *(f"  {note}" for note in notes)])


def _which(places: Sequence[str], number: int) -> str:
    if len(places) == number > 1:
        return "all"
    return ", ".join(places) if len(places) <= _MAX_NAMES else f"{len(places)} of {number} rows"


def _row(fit: Fit, name: str, target: Target | None) -> list[str]:
    plain = fit.plain
    row = [
        name,
        fit.place.depth,
        str(len(fit.points)),
        _plus_minus(plain.exponent),
        _plus_minus(fit.corrected.exponent),
        f"{plain.r_squared:.3f}",
        " ".join(f"{local.slope:+.2f}" for local in plain.local_slopes),
        _curved(fit),
    ]
    if target:
        sigma = fit.sigma_at(target)
        names = [label(found) for found in _sequences(sigma).values()]
        row += [f"{sigma.value:.2g} ({sigma.low:.2g} to {sigma.high:.2g})", *names]
    return row


def _plus_minus(estimate: Estimate) -> str:
    half = estimate.high - estimate.value
    value = round(estimate.value, 3) + 0.0  # no negative zero
    return f"{value:+.3f} ± " + (f"{half:.3f}" if math.isfinite(half) else "∞")


def _curved(fit: Fit) -> str:
    if fit.plain.curvature is None:
        return "?"
    which = [name for name, law in (("σ", fit.plain), ("σ·√r", fit.corrected)) if law.is_curved]
    return ", ".join(which) or "no"
