"""What the ladder of `benchmarks.spectral_ladder` says of the paper's power laws, by depth. Trains nothing."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.claims.command import Results
from benchmarks.claims.markdown import number, table

NAME = "spectral_ladder"
DEPTHS = ("mid-early", "mid", "mid-late", "final")
MIDDLE = ("mid", "mid-late")
NEAR = 0.15  # of the exponent that width alone gives

Law = dict[str, Any]


def by_depth(results: Results) -> dict[str, list[Law]]:
    """The laws of each relative depth; those of a layer that is the only one of its kind have none."""
    return {depth: [law for law in results["laws"] if law["depth"] == depth] for depth in DEPTHS}


def exponents(laws: list[Law], kind: str) -> list[float]:
    """α of each law: ``kind`` is ``"plain"`` (of σ) or ``"width_corrected"`` (of σ·√r)."""
    return [law[kind]["exponent"]["value"] for law in laws]


def tables(results: Results) -> str:
    """The results in Markdown."""
    rows = []
    for depth, laws in by_depth(results).items():
        plain, corrected = exponents(laws, "plain"), exponents(laws, "width_corrected")
        curved = sum(law["plain"]["is_curved"] for law in laws)
        rows.append(
            [depth, str(len(laws)), _spread(plain), _spread(corrected), f"{_near(corrected)} of {len(laws)}",
             f"{curved} of {len(laws)}"]
        )  # fmt: skip
    header = ["depth", "laws", "α of σ: median (range)", "α of σ·√r", f"within {NEAR} of width's", "curved"]
    return table(header, rows) + "\n\n" + "\n".join(findings(results))


def _spread(values: list[float]) -> str:
    return f"{number(median(values), 2)} ({number(min(values), 2)} – {number(max(values), 2)})"


def _near(corrected: list[float]) -> int:
    return sum(abs(value) <= NEAR for value in corrected)


def findings(results: Results) -> list[str]:
    """What was seen of the claims, and what was not, a sentence each."""
    laws = by_depth(results)
    middle = [law for depth in MIDDLE for law in laws[depth]]
    near = _near(exponents(middle, "width_corrected"))
    final, between = (median(exponents(some, "plain")) for some in (laws["final"], middle))
    curved = sum(law["plain"]["is_curved"] for law in laws["final"])
    return [
        f"- {_seen(2 * near > len(middle))}: in the middle layers the exponent is mostly what width alone gives. It is"
        f" within {NEAR} of that for {near} of {len(middle)} laws.",
        f"- {_seen(final > between)}: the final block's median σ falls faster with size than the middle layers'. The"
        f" median exponent is {final:.2f} there and {between:.2f} in the middle.",
        f"- {_seen(curved > 0)}: laws of the final block are curved, so that they do not extrapolate. {curved} of"
        f" {len(laws['final'])} are.",
    ]


def _seen(is_seen: bool) -> str:
    return "Seen" if is_seen else "Not seen"


def described(results: Results) -> str:
    """What the runs were."""
    runs = results["runs"]
    widths, seeds = ({run[key] for run in runs} for key in ("width", "seed"))
    sizes = [run["parameters"] for run in runs]
    return (
        f"{len(runs)} runs at widths {', '.join(map(str, sorted(widths)))}, {min(sizes) / 1e6:.2f} to"
        f" {max(sizes) / 1e6:.2f} million parameters, {len(seeds)} seeds; quantile {results['quantile']}."
        f" {results['cpu']}, Python {results['python']}, torch {results['torch']}, Lightning {results['lightning']},"
        f" commit `{results['commit'][:10]}`."
    )
