"""At which share of AdamW's steps Muon reaches AdamW's loss, both tuned.

``python -m benchmarks.claims.steps_to_loss [--json benchmarks/results/steps_to_loss.json]
[--picture docs/pictures/steps_to_loss.png] [--shares 0.4 0.5 0.55 0.6 0.65 0.7 0.8]``

Both optimizers are tuned over the same grid of two learning rates (of the matrices, of the rest) and two initial
scales, on seeds that are not reported; a grid grows until its best rates are inside. AdamW is tuned at full length,
Muon at the share of it that is claimed, and again at full length. Then AdamW runs at full length and Muon at that and
at shares of it, each to the end of a schedule of its own, from the same weights (but for their scale) and over the same
windows of text for each seed. All of Muon's shares take the rates that were best at the claimed one.

AdamW with one learning rate for everything, tuned as well, is what a naive comparison would take.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.command import Results, diverged_text, main, tuning_as_json
from benchmarks.claims.crossing import crossing, smallest_sure
from benchmarks.claims.figure import ADAMW, MUON, OTHER, frame, panels, with_seeds
from benchmarks.claims.laboratory import USUAL_SEARCHES, Laboratory, Search, losses_of, without_diverged
from benchmarks.claims.markdown import number, p_value, table, verdict
from benchmarks.claims.paired import Spread, paired
from benchmarks.claims.tuning import Rates

NAME = "steps_to_loss"
SHARES = (0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8)
CLAIMED_SHARE = 0.6

SEARCHES = {
    **USUAL_SEARCHES,
    "muon_short": Search("muon", share=CLAIMED_SHARE),
    "adamw_one_rate": Search("adamw", one_rate=True),
}

Losses = Mapping[int, float]  # by seed


def experiment(laboratory: Laboratory) -> Results:
    """Tunes, and does the runs that are reported."""
    tuned = laboratory.tune(SEARCHES)
    setting, seeds, short = laboratory.setting, laboratory.seeds, tuned["muon_short"].best
    shares = sorted({*laboratory.options.shares, CLAIMED_SHARE})
    steps = {share: round(share * setting.steps) for share in shares}
    arms = {
        "adamw": setting.reported("adamw", tuned["adamw"].best, seeds),
        "adamw_one_rate": {s: setting.run("adamw", tuned["adamw_one_rate"].best, s) for s in seeds},
        "muon": setting.reported("muon", tuned["muon"].best, seeds),
        **{str(share): {s: setting.run("muon", short, s, n) for s in seeds} for share, n in steps.items()},
    }
    done = laboratory.do_arms(arms)
    whole, diverged = without_diverged(done)
    losses = losses_of(done)
    muon = {**{share: losses[str(share)] for share in shares}, 1.0: losses["muon"]}
    return {
        "shares": shares,
        "tuning": tuning_as_json(tuned),
        "diverged": diverged,
        "val_loss": losses_of(whole),
        **summarize(muon, losses["adamw"], losses["adamw_one_rate"]),
    }


def summarize(muon: Mapping[float, Losses], adamw: Losses, one_rate: Losses) -> Results:
    """What is said of the losses; one of a run that diverged is infinite.

    Args:
        muon: By share of the steps and seed.
        adamw: By seed, at full length.
        one_rate: The same with one learning rate for everything.

    Returns:
        The differences of arms in which no run diverged, and the shares of the steps at which Muon has reached either
        target. Of a target of which a run diverged there is nothing: no seed is left out by itself.
    """
    found: Results = {}
    if _is_whole(adamw):
        found["against_adamw"] = {
            str(share): paired(losses, adamw).asdict() for share, losses in sorted(muon.items()) if _is_whole(losses)
        }
        found["sure_share"] = smallest_sure(muon, adamw)
        found["step_ratio"] = _ratios(muon, adamw)
    if _is_whole(one_rate):
        found["sure_share_against_one_rate"] = smallest_sure(muon, one_rate)
        found["step_ratio_against_one_rate"] = _ratios(muon, one_rate)
    if _is_whole(adamw) and _is_whole(one_rate):
        found["one_rate_against_adamw"] = paired(one_rate, adamw).asdict()
    return found


def _is_whole(losses: Losses) -> bool:
    return all(map(math.isfinite, losses.values()))


def _ratios(muon: Mapping[float, Losses], target: Losses) -> dict[str, Any]:
    """For each seed the share of the steps at which Muon has reached the target, and how these spread."""
    found = {seed: crossing({share: losses[seed] for share, losses in muon.items()}, target[seed]) for seed in target}
    reached = [one.share for one in found.values() if one.share is not None]
    spread = Spread.of(reached) if reached else None
    return {
        "by_seed": {seed: one.share for seed, one in found.items()},
        "seeds_at_or_below_the_smallest_share": [seed for seed, one in found.items() if one.is_bound],
        "seeds_never": [seed for seed, one in found.items() if one.share is None],
        "mean": None if spread is None else spread.mean,
        "sd": None if spread is None else spread.sd,
    }


def headline(results: Results) -> str:
    """The claim alone, in Markdown, for who reads one table."""
    losses, against, steps = results["val_loss"], results.get("against_adamw", {}), results["steps"]
    arms = [("AdamW", steps, "adamw", None)] + [
        (f"Muon, {100 * share:.0f} % of the steps", round(share * steps), arm, against.get(str(share)))
        for share, arm in ((CLAIMED_SHARE, str(CLAIMED_SHARE)), (1.0, "muon"))
    ]
    rows = []
    for name, length, arm, difference in arms:
        loss = Spread.of(list(losses[arm].values())).text() if arm in losses else "diverged"
        compared = ["", ""]
        if difference is not None:
            compared = [
                number(difference["mean"], sign=True),
                f"{difference['seeds_below']} of {len(results['seeds'])}",
            ]
        rows.append([name, f"{length:,}", loss, *compared])
    text = table(["", "steps", "loss at the end, nats per byte", "minus AdamW's", "seeds below"], rows)
    if "step_ratio" in results:
        text += "\n\n" + _interpolated(results)
    return text


def tables(results: Results) -> str:
    """The results in Markdown."""
    losses, tuning, seeds = results["val_loss"], results["tuning"], [str(seed) for seed in results["seeds"]]
    header = ["", "steps", *(f"seed {seed}" for seed in seeds), "mean ± sd", "minus AdamW", "seeds below", "p of below"]
    against, full = results.get("against_adamw", {}), results["steps"]
    arms: list[tuple[str, int, str, Any]] = [
        ("AdamW", full, "adamw", None),
        ("AdamW, one rate", full, "adamw_one_rate", results.get("one_rate_against_adamw")),
        *(
            (f"Muon, {100 * s:.0f} %", round(s * full), "muon" if s == 1 else str(s), against.get(str(s)))
            for s in reversed((*results["shares"], 1.0))
        ),
    ]
    rows = [_row(name, steps, losses.get(arm), seeds, difference) for name, steps, arm, difference in arms]
    rates = [
        [_ARMS[arm], f"{one['lr']:g}", "the same" if one["adamw_lr"] is None else f"{one['adamw_lr']:g}",
         f"{one['initializer_range']:g}", f"{len(one['tried'])}", "yes" if one["is_on_edge"] else "no"]
        for arm, one in tuning.items()
    ]  # fmt: skip
    return "\n\n".join(
        [
            table(header, rows),
            table(
                ["tuned", "rate of the matrices", "of the rest", "initial scale", "tried", "rates on the edge"],
                rates,
            ),
            "\n".join(findings(results)),
        ]
    )


_ARMS = {
    "adamw": "AdamW",
    "adamw_one_rate": "AdamW, one rate",
    "muon": "Muon",
    "muon_short": f"Muon, {100 * CLAIMED_SHARE:.0f} % of the steps",
}


def _row(
    name: str,
    steps: int,
    losses: Mapping[str, float] | None,
    seeds: Sequence[str],
    difference: Mapping[str, Any] | None,
) -> list[str]:
    if losses is None:
        return [name, str(steps), *("" for _ in seeds), "diverged", "", "", ""]
    compared = ["", "", ""]
    if difference is not None:
        below = f"{difference['seeds_below']} of {len(seeds)}"
        compared = [number(difference["mean"], sign=True), below, p_value(difference["p_below"])]
    spread = Spread.of(list(losses.values())).text()
    return [name, str(steps), *(number(losses[seed]) for seed in seeds), spread, *compared]


def findings(results: Results) -> list[str]:
    """What was seen of the claim, and what was not, a sentence each."""
    seeds, said = len(results["seeds"]), diverged_text(results)
    claim = f"tuned Muon at {100 * CLAIMED_SHARE:.0f} % of the steps below tuned AdamW at all of them, in every seed."
    claimed = results.get("against_adamw", {}).get(str(CLAIMED_SHARE))
    if claimed is None:
        said.append(f"- {verdict(False)}: {claim} Training diverged.")
    else:
        said.append(
            f"- {verdict(claimed['seeds_below'] == seeds)}: {claim} The mean difference is"
            f" {number(claimed['mean'], sign=True)}, below zero in {claimed['seeds_below']} of {seeds} seeds."
        )
    if "step_ratio" in results:
        sure = results["sure_share"]
        said.append(
            "- At no share of the steps, with all larger ones, was Muon below AdamW in every seed."
            if sure is None
            else f"- The smallest share that was tried from which on Muon is below AdamW in every seed is"
            f" {100 * sure:.0f} %."
        )
        said.append(f"- {_interpolated(results)}")
    if "one_rate_against_adamw" in results:
        said.append(
            f"- The trap: AdamW with one learning rate for everything differs from AdamW with two by"
            f" {number(results['one_rate_against_adamw']['mean'], sign=True)}. Against it, Muon would have been below"
            f" from {_ratio_text(results['step_ratio_against_one_rate'], seeds)}."
        )
    return said + _luck(results)


def _luck(results: Results) -> list[str]:
    """How much of the tuned losses was the tuning seeds' luck: the best of many looks better than it is."""
    arms = {"adamw": ("adamw", "AdamW's"), "muon_short": (str(CLAIMED_SHARE), "Muon's shorter one")}
    said = []
    for name, (arm, label) in arms.items():
        tuned = results["tuning"][name]
        first = [loss for one in tuned["tried"] if (loss := next(iter(one["val_loss"].values()))) is not None]
        best = [one for one in tuned["tried"] if all(one[key] == tuned[key] for key in Rates._fields)]
        if best and arm in results["val_loss"]:
            on_all = Spread.of(list(best[0]["val_loss"].values()))
            mean = Spread.of(list(results["val_loss"][arm].values())).mean
            said.append(
                f"{label} lowest was {number(min(first))} on the first, what was chosen has {number(on_all.mean)} on"
                f" all and {number(mean)} on the reported ones"
            )
    if not said:
        return []
    return [f"- The best of a search is partly the luck of the seeds that it was searched on: {'; '.join(said)}."]


def _interpolated(results: Results) -> str:
    ratio = _ratio_text(results["step_ratio"], len(results["seeds"]))
    return f"By interpolation, Muon is below AdamW's loss from {ratio}."


def _ratio_text(ratio: Mapping[str, Any], seeds: int) -> str:
    if ratio["mean"] is None:
        return "no share of the steps that was tried: at the largest it is above"
    spread = f"{100 * ratio['mean']:.1f}" + ("" if ratio["sd"] is None else f" ± {100 * ratio['sd']:.1f}")
    text = f"{spread} % of AdamW's steps on (mean ± sd over the seeds)"
    if bounds := ratio["seeds_at_or_below_the_smallest_share"]:
        text += f", an upper bound: {len(bounds)} of {seeds} seeds were there at the smallest share already"
    if never := ratio["seeds_never"]:
        text += f", without {len(never)} of {seeds} seeds, which were above at the largest"
    return text


def draw(results: Results, path: Path) -> None:
    """Muon's loss over the share of the steps, against AdamW's two."""
    losses, seeds = results["val_loss"], [str(seed) for seed in results["seeds"]]
    arms = {share: "muon" if share == 1 else str(share) for share in (*results["shares"], 1.0)}
    shown = {100 * share: losses[arm] for share, arm in arms.items() if arm in losses}
    with panels(path, 1, width=7) as (axes,):
        if shown:
            by_seed = [[one[seed] for one in shown.values()] for seed in seeds]
            with_seeds(axes, list(shown), by_seed, color=MUON, label="Muon")
        for arm, colour in (("adamw_one_rate", OTHER), ("adamw", ADAMW)):
            if arm not in losses:
                continue
            values = list(losses[arm].values())
            axes.axhspan(min(values), max(values), color=colour, alpha=0.15, linewidth=0)
            axes.axhline(sum(values) / len(values), color=colour, linewidth=1.8, label=f"{_ARMS[arm]}, all steps")
        frame(
            axes,
            f"steps of the run, % of AdamW's {results['steps']}",
            "validation loss at its end, nats per byte",
            f"every point a run with a schedule of its own; {len(seeds)} seeds, bands from the lowest to the highest",
        )
        axes.legend(frameon=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this experiment takes beside the others' options."""
    parser.add_argument("--shares", type=_share, nargs="+", default=SHARES, help=f"below 1; {CLAIMED_SHARE} is added")


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share between 0 and 1; all the steps run in any case")
    return share


if __name__ == "__main__":
    main(__doc__, NAME, experiment, tables, draw, add_options=add_options)
