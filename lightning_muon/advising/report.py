"""The advice for JSON, and as text to read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning_muon.advising.advice import Advice, Need
from lightning_muon.advising.config import patterns, snippet
from lightning_muon.advising.observed import Observed
from lightning_muon.orthogonalize import nominal_sequence
from lightning_muon.usage import columns

__all__ = ["figures", "table", "warnings"]

_TAKEN = ("fewest", "median", "most")
# Names that a line gives.
_MAX_NAMES = 3
# A last quarter of fewer logged steps, and a run of fewer optimizer steps, say little of those to come.
_FEW_STEPS, _BURN_IN = 3, 200


def figures(observed: Observed, advices: Sequence[Advice], percent: int, band: float) -> dict[str, Any]:
    """Everything that was found, as plain numbers."""
    before, after = _totals(advices)
    return {
        "run": str(observed.run),
        "steps_of_run": [observed.steps[0], observed.steps[-1]],
        "quantile": f"q{percent}",
        "band": band,
        "advice": [_figures(advice) for advice in advices],
        "unknown": list(observed.unknown),
        "warnings": warnings(observed, advices),
        "flops": {"advised": after, "run": before, "saved": before - after},
        "patterns": patterns(advices),
        "snippet": snippet(advices),
    }


def _figures(advice: Advice) -> dict[str, Any]:
    return {
        "type": advice.place.type,
        "blocks": list(advice.place.blocks),
        "parameters": {
            need.name: {
                "matrices": [list(one) for one in need.description.matrices],
                "dtype": need.description.dtype,
                "orthogonalization_of_run": need.description.orthogonalization,
                "ns_steps_of_run": need.steps_taken and dict(zip(_TAKEN, need.steps_taken, strict=True)),
                "participation_rank": need.participation_rank,
                "sigmas_schatten4": {f"q{percent}": sigma for percent, sigma in need.sigmas.items()},
            }
            for need in advice.needs
        },
        "steps": advice.steps,
        "steps_over_window": list(advice.over_window),
        "orthogonalization": advice.orthogonalization,
        "sigma_schatten4": advice.sigma,
        "noise_floor_schatten4": advice.floor,
        "left_below": {"at_least": advice.left_below[0], "at_most": advice.left_below[1]},
        "flops": {"advised": advice.flops, "run": advice.flops_of_run},
    }


def table(observed: Observed, advices: Sequence[Advice], percent: int, band: float) -> str:
    """The advice as text, and the code to paste."""
    before, after = _totals(advices)
    rows: list[tuple[str, ...]] = [
        ("layer type", "blocks", "matrices", f"σ (q{percent})", "steps", "of the run", f"below {1 - band:g}", "GFLOP")
    ]
    rows += [(*_row(advice),) for advice in advices]
    first, last = observed.steps[0], observed.steps[-1]
    of_steps = f"steps {first} to {last}" if first < last else f"step {first}"
    change = f"{abs(1 - after / before):.1%} {'less' if after <= before else 'more'}"
    lines = [
        f"{observed.run}: spectra of optimizer {of_steps}",
        "",
        *columns(rows),
        "",
        "σ is the lowest of all matrices and steps, in units of the Schatten-4 norm, as polar_express(norm='schatten4')"
        " sees it;",
        "~ is below what the precision tells from rounding, which then decides. Below: the share of σ that ends below"
        " the band, of the",
        "worst matrix.",
        f"Newton–Schulz: {after / 1e9:,.3f} GFLOP per optimizer step, {before / 1e9:,.3f} as the run did it: {change}.",
    ]
    if after > before and not all(need.is_auto for advice in advices for need in advice.needs):
        lines.append(
            "The run's own sequences do not reach so far down; --quantile q75, say, or a wider --band ask for less."
        )
    if observed.unknown:
        number = len(observed.unknown)
        which = f"{number} parameter{'s' if number > 1 else ''} ({_some(observed.unknown)})"
        lines.append(f"Without a spectrum here, and left as {'they are' if number > 1 else 'it is'}: {which}.")
    if notes := warnings(observed, advices):
        lines += ["", "warnings", *(f"  {note}" for note in notes)]
    return "\n".join(
        [
            *lines,
            "",
            'lm.Muon(..., orthogonalization="auto") chooses so for every matrix while training, and follows its'
            " spectrum. To fix it beforehand:",
            "",
            snippet(advices),
        ]
    )


def warnings(observed: Observed, advices: Sequence[Advice]) -> list[str]:
    """What makes the advice less certain than it looks."""
    number, last = len(observed.steps), observed.steps[-1]
    found = [f"{folder} repeats the figures of this run: left out" for folder in observed.repeats]
    if number < _FEW_STEPS:
        found.append(
            f"the last quarter of the logged steps is {number} step{'s' if number > 1 else ''}: a spectrum differs from"
            " one step to the next; a smaller every_n_steps shows by how much"
        )
    if last < _BURN_IN:
        found.append(
            f"the last logged step is {last}: spectra change most in the first {_BURN_IN} or so, and may need other"
            " steps later"
        )
    breathing = [
        f"{advice.place.type}{f' {advice.place.depth}' if advice.place.blocks else ''} ({advice.over_window[0]} to"
        f" {advice.over_window[1]})"
        for advice in advices
        if advice.over_window[0] < advice.over_window[1]
    ]
    if breathing:
        found.append(f"the steps that are needed differ from one logged step to another: {_some(breathing)}")
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (", …" if len(names) > _MAX_NAMES else "")


def _totals(advices: Iterable[Advice]) -> tuple[int, int]:
    return sum(one.flops_of_run for one in advices), sum(one.flops for one in advices)


def _row(advice: Advice) -> Iterable[str]:
    shapes: dict[tuple[int, int], int] = {}
    for need in advice.needs:
        for rows, cols, count in need.description.matrices:
            shapes[rows, cols] = shapes.get((rows, cols), 0) + count
    at_least, at_most = advice.left_below
    yield advice.place.type
    yield advice.place.depth
    yield ", ".join(f"{count} of {rows}x{cols}" for (rows, cols), count in shapes.items())
    yield ("~" if advice.sigma < advice.floor else "") + f"{advice.sigma:.2g}"
    yield str(advice.steps)
    yield " or ".join(dict.fromkeys(_words(need, advice.needs) for need in advice.needs))
    yield f"{at_least:.0%} to {at_most:.0%}" if at_least > 0 else f"≤ {at_most:.0%}"
    yield f"{advice.flops / 1e9:,.3f}"


def _words(need: Need, row: Iterable[Need]) -> str:
    """The steps of the run; of ``"auto"``, those of the whole row."""
    if not need.is_auto:
        sequence = nominal_sequence(need.description.orthogonalization)
        return "exact" if sequence is None else str(len(sequence.steps))
    if need.steps_taken is None:
        return "auto (counted as 5)"
    taken = [one.steps_taken for one in row if one.is_auto and one.steps_taken is not None]
    fewest, most = min(one[0] for one in taken), max(one[2] for one in taken)
    return f"auto: {fewest}" + (f" to {most}" if fewest < most else "")
