"""What the ladder of `benchmarks.spectral_ladder` says of the paper's power laws, by depth. Trains nothing."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from benchmarks.claims.command import Results
from benchmarks.claims.markdown import listed, number, table, verdict

NAME = "spectral_ladder"
DEPTHS = ("mid-early", "mid", "mid-late", "final")
MIDDLE = ("mid", "mid-late")
NEAR = 0.15  # of the exponent that width alone gives
FALSE_ALARMS = 0.05  # of straight laws, the share that a 95 % interval calls curved

Law = dict[str, Any]


def by_depth(results: Results) -> dict[str, list[Law]]:
    """The laws of each relative depth; those of a layer that is the only one of its kind have none."""
    return {depth: [law for law in results["laws"] if law["depth"] == depth] for depth in DEPTHS}


def exponents(laws: list[Law], kind: str) -> list[float]:
    """α of each law: ``kind`` is ``"plain"`` (of σ) or ``"width_corrected"`` (of σ·√r)."""
    return [law[kind]["exponent"]["value"] for law in laws]


def by_type(results: Results) -> dict[str, dict[str, float]]:
    """α of σ in the middle and in the final block, for each type of layer that has all three."""
    found: dict[str, dict[str, float]] = {}
    for law in results["laws"]:
        found.setdefault(_short(law["type"]), {})[law["depth"]] = law["plain"]["exponent"]["value"]
    return {name: of for name, of in found.items() if {*MIDDLE, "final"} <= of.keys()}


def _short(name: str) -> str:
    """A type without what all of them have in their names."""
    return name.removeprefix("model.layers.*.").removesuffix(".weight")


def tables(results: Results) -> str:
    """The results in Markdown."""
    rows = []
    for depth, laws in by_depth(results).items():
        plain, corrected = exponents(laws, "plain"), exponents(laws, "width_corrected")
        rows.append(
            [depth, str(len(laws)), _spread(plain), _spread(corrected), f"{_near(corrected)} of {len(laws)}",
             f"{_curved(laws)} of {len(laws)}"]
        )  # fmt: skip
    header = ["depth", "laws", "α of σ: median (range)", "α of σ·√r", f"within {NEAR} of width's", "curved"]
    shown = (*MIDDLE, "final")
    types = [[f"`{name}`", *(number(of[depth], 2) for depth in shown)] for name, of in by_type(results).items()]
    return "\n\n".join([table(header, rows), table(["α of σ", *shown], types), "\n".join(findings(results))])


def _spread(values: list[float]) -> str:
    return f"{number(median(values), 2)} ({number(min(values), 2)} – {number(max(values), 2)})"


def _near(corrected: list[float]) -> int:
    return sum(abs(value) <= NEAR for value in corrected)


def _curved(laws: list[Law]) -> int:
    return sum(law["plain"]["is_curved"] for law in laws)


def _is_beyond_chance(count: int, number_of_laws: int) -> bool:
    """Whether so many or more of straight laws would be called curved with a probability below 5 %."""
    p = sum(
        math.comb(number_of_laws, k) * FALSE_ALARMS**k * (1 - FALSE_ALARMS) ** (number_of_laws - k)
        for k in range(count, number_of_laws + 1)
    )
    return p < 0.05


def findings(results: Results) -> list[str]:
    """What was seen of the claims, and what was not, a sentence each."""
    laws = by_depth(results)
    middle = [law for depth in DEPTHS if depth != "final" for law in laws[depth]]
    near = _near(exponents(middle, "width_corrected"))
    each = "; ".join(
        f"{depth} {_near(exponents(laws[depth], 'width_corrected'))} of {len(laws[depth])}"
        for depth in DEPTHS
        if depth != "final"
    )
    types = by_type(results)
    steeper = [name for name, of in types.items() if of["final"] > max(of[depth] for depth in MIDDLE)]
    named = f": {listed([f'`{name}`' for name in steeper])}" if steeper else ""
    every = [law for depth in DEPTHS for law in laws[depth]]
    expected = FALSE_ALARMS * len(every)
    where = "; ".join(f"{depth} {_curved(laws[depth])} of {len(laws[depth])}" for depth in DEPTHS)
    is_curved = _is_beyond_chance(_curved(laws["final"]), len(laws["final"]))
    return [
        f"- {verdict(2 * near > len(middle))}: before the final block the exponent is mostly what width alone gives."
        f" It is within {NEAR} of that for {near} of {len(middle)} laws ({each}).",
        f"- {verdict(len(steeper) == len(types))}: σ falls faster with size in the final block than in the middle,"
        f" for every type of layer. It does for {len(steeper)} of {len(types)}{named}.",
        f"- {verdict(is_curved)}: laws of the final block are curved, more of them than by chance, so that they do not"
        f" extrapolate. Of all {len(every)} laws {_curved(every)} are"
        f" curved, where straight ones would give {expected:.1f} by chance ({100 * FALSE_ALARMS:.0f} % each): {where}.",
    ]


def described(results: Results) -> str:
    """What the runs were."""
    runs = results["runs"]
    widths, seeds = ({run[key] for run in runs} for key in ("width", "seed"))
    sizes = [run["parameters"] for run in runs]
    density = [run["tokens"] / run["parameters"] for run in runs]
    return (
        f"{len(runs)} runs at widths {', '.join(map(str, sorted(widths)))}, {min(sizes) / 1e6:.2f} to"
        f" {max(sizes) / 1e6:.2f} million parameters, {len(seeds)} seeds; {min(density):.1f} to"
        f" {max(density):.1f} tokens per parameter, learning rates not tuned and the same for all; quantile"
        f" {results['quantile']}."
        f" {results['cpu']}, Python {results['python']}, torch {results['torch']}, Lightning {results['lightning']},"
        f" commit `{results['commit'][:10]}`."
    )
