"""SVD entropy of the weights after Muon and after AdamW, matrix by matrix (Moonlight, §3.4).

``python -m benchmarks.claims.svd_entropy [--json benchmarks/results/svd_entropy.json]
[--picture docs/pictures/svd_entropy.png]``

The runs are at full length, both optimizers at the learning rates that were best at the usual initial scale in the
search of `steps_to_loss`. So every matrix is compared with itself under the other optimizer, from the same initial
weights and over the same text. The routers' matrices are counted apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.claims.command import Results, diverged_text, main, tuning_as_json
from benchmarks.claims.figure import ADAMW, MUON, frame, panels
from benchmarks.claims.kinds import KINDS, by_kind, matrices
from benchmarks.claims.laboratory import SEARCHES_AT_USUAL_SCALE, Laboratory, without_diverged
from benchmarks.claims.markdown import number, table, verdict

NAME = "svd_entropy"
CLAIMED_SHARE = 0.9
PREFIX = "muon/weight_svd_entropy/"
# Moonlight's figure 4 at 33 thousand iterations, read off the picture: Muon's and AdamW's mean
PAPER = {
    "AttnQO": (0.873, 0.817),
    "AttnKV": (0.945, 0.920),
    "Experts": (0.943, 0.931),
    "SharedExperts": (0.925, 0.900),
    "Dense": (0.980, 0.957),
    "Router": (0.905, 0.775),
}

Entropies = Mapping[str, Mapping[str, float]]  # by seed and matrix


def experiment(laboratory: Laboratory) -> Results:
    """The tuned runs, and the entropies at their ends."""
    tuned = laboratory.tune(SEARCHES_AT_USUAL_SCALE)
    runs = {one: laboratory.setting.reported(one, tuned[one].best, laboratory.seeds) for one in ("muon", "adamw")}
    outcomes, diverged = without_diverged(laboratory.do_arms(runs))
    entropies = {
        optimizer: {str(seed): matrices(outcome.last(PREFIX)) for seed, outcome in by_seed.items()}
        for optimizer, by_seed in outcomes.items()
    }
    return {
        "tuning": tuning_as_json(tuned),
        "diverged": diverged,
        "entropy": entropies,
        "summary": {} if diverged else summarize(entropies["muon"], entropies["adamw"]),
    }


def summarize(muon: Entropies, adamw: Entropies) -> dict[str, dict[str, Any]]:
    """For each kind of matrix its mean and how often Muon's is higher; the same for all and for all but the routers',
    with the means of the kinds' means.

    Args:
        muon: The entropy of every matrix, for every seed.
        adamw: The same.
    """
    names = next(iter(muon.values())).keys()
    groups = by_kind(names)
    found = {kind: _compare(muon, adamw, members) for kind, members in groups.items()}
    unions = {"all but routers": [kind for kind in groups if kind != "Router"], "all": list(groups)}
    for name, kinds in unions.items():
        members = [matrix for kind in kinds for matrix in groups[kind]]
        means = {optimizer: fmean(found[kind][optimizer] for kind in kinds) for optimizer in ("muon", "adamw")}
        found[name] = {**_compare(muon, adamw, members), **means}
    return found


def _compare(muon: Entropies, adamw: Entropies, names: list[str]) -> dict[str, Any]:
    differences = {seed: [muon[seed][name] - adamw[seed][name] for name in names] for seed in muon}
    higher = {seed: sum(difference > 0 for difference in found) for seed, found in differences.items()}
    return {
        "matrices": len(names),
        "muon": fmean(muon[seed][name] for seed in muon for name in names),
        "adamw": fmean(adamw[seed][name] for seed in adamw for name in names),
        "higher_by_seed": higher,
        "share_higher": sum(higher.values()) / (len(names) * len(higher)),
        "smallest_difference": min(min(found) for found in differences.values()),
    }


def tables(results: Results) -> str:
    """The results in Markdown."""
    rows = []
    for kind, one in results["summary"].items():
        paper = "" if kind not in PAPER else f"{PAPER[kind][0]:.3f}, {PAPER[kind][1]:.3f}"
        higher = ", ".join(str(count) for count in one["higher_by_seed"].values())
        share = f"{100 * one['share_higher']:.1f} %"
        means = [number(one["muon"]), number(one["adamw"]), number(one["muon"] - one["adamw"], sign=True)]
        rows.append([kind, str(one["matrices"]), *means, higher, share, paper])
    seeds = ", ".join(map(str, results["seeds"]))
    header = ["", "matrices", "Muon", "AdamW", "difference", f"Muon higher, seeds {seeds}", "share", "Moonlight's"]
    return table(header, rows) + "\n\n" + "\n".join(findings(results))


def findings(results: Results) -> list[str]:
    """What was seen of the claim, and what was not."""
    said = diverged_text(results)
    if not results["summary"]:
        return said
    rest, routers = results["summary"]["all but routers"], results["summary"].get("Router")
    said += [
        f"- {verdict(rest['share_higher'] > CLAIMED_SHARE)}: a higher entropy under Muon in more than"
        f" {100 * CLAIMED_SHARE:.0f} % of the matrices. It is higher in {100 * rest['share_higher']:.1f} % of all but"
        f" the routers', over {len(results['seeds'])} seeds."
    ]
    if routers is not None:
        said.append(f"- Of the routers' matrices it is higher in {100 * routers['share_higher']:.1f} %.")
    lower = [kind for kind, one in results["summary"].items() if kind in KINDS and one["muon"] <= one["adamw"]]
    said.append(
        "- The mean is higher under Muon for every kind of matrix."
        if not lower
        else f"- The mean is not higher under Muon for {', '.join(lower)}."
    )
    return said


def draw(results: Results, path: Path) -> None:
    """Every matrix: its entropy after AdamW, and after Muon; nothing if one of the two diverged."""
    if not results["summary"]:
        return
    muon, adamw = results["entropy"]["muon"], results["entropy"]["adamw"]
    groups = by_kind(next(iter(muon.values())))
    colours = dict(zip(KINDS, ("#4c72b0", "#6fa8dc", "#dd8452", "#e3b23c", "#8c8c8c", "#c44e52"), strict=True))
    with panels(path, 2) as (scatter, means):
        for kind, names in groups.items():
            x = [adamw[seed][name] for seed in adamw for name in names]
            y = [muon[seed][name] for seed in muon for name in names]
            scatter.plot(x, y, linestyle="", marker=".", markersize=5, alpha=0.7, color=colours[kind], label=kind)
        lowest = min(min(min(one.values()) for one in each.values()) for each in (muon, adamw)) - 0.02
        scatter.plot([lowest, 1], [lowest, 1], color="black", linewidth=0.8)
        frame(scatter, "after AdamW", "after Muon", "SVD entropy of every matrix; above the line, Muon's is higher")
        scatter.legend(frameon=False, fontsize=8)
        for place, kind in enumerate(reversed(groups)):
            one = results["summary"][kind]
            means.plot([one["adamw"], one["muon"]], [place, place], color="#c0c0c0", linewidth=3, zorder=1)
        for optimizer, label, colour in (("adamw", "AdamW", ADAMW), ("muon", "Muon", MUON)):
            values = [results["summary"][kind][optimizer] for kind in reversed(groups)]
            means.plot(values, range(len(groups)), linestyle="", marker="o", markersize=8, color=colour, label=label)
        means.set_yticks(range(len(groups)), list(reversed(groups)))
        frame(means, "mean SVD entropy", "", f"means over the matrices of a kind and {len(muon)} seeds")
        means.legend(frameon=False, loc="lower left")


if __name__ == "__main__":
    main(__doc__, NAME, experiment, tables, draw)
