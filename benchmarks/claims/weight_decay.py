"""Muon with and without weight decay: how the weights grow, and which is better, soon and later (Moonlight, §2.2).

``python -m benchmarks.claims.weight_decay [--json benchmarks/results/weight_decay.json]
[--picture docs/pictures/weight_decay.png]``

A run at the usual length and one five times as long, each with a schedule of its own, at the learning rates that were
best at the usual length and the usual initial scale with a decay of 0.1: no decay has none of its own. A crossover is
said to be seen only if the runs without decay are better in every seed at one length and worse in every seed at the
other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.claims.command import Results, diverged_text, main, tuning_as_json
from benchmarks.claims.figure import ADAMW, MUON, frame, panels, with_seeds
from benchmarks.claims.kinds import parameters
from benchmarks.claims.laboratory import SEARCHES_AT_USUAL_SCALE, Laboratory, losses_of, without_diverged
from benchmarks.claims.markdown import number, p_value, table, verdict
from benchmarks.claims.paired import Spread, paired
from benchmarks.claims.run import Outcome
from benchmarks.claims.setting import SEEDS, interval

NAME = "weight_decay"
DECAY, LONG = 0.1, 5
LENGTHS, NAMES = ("short", "long"), ("decay", "none")
PREFIX = "muon/weight_rms/"

Curve = list[tuple[int, float]]  # step, value


def experiment(laboratory: Laboratory) -> Results:
    """With and without decay, short and long."""
    setting, seeds = laboratory.setting, laboratory.seeds
    tuned = laboratory.tune(SEARCHES_AT_USUAL_SCALE)
    rates, long = tuned["muon"].best, LONG * setting.steps
    measured: dict[str, Any] = {"measure": ("weights",)}
    often = {length: interval(steps, 10) for length, steps in (("short", setting.steps), ("long", long))}
    arms = {
        "short, decay": setting.reported("muon", rates, seeds),
        "short, none": {
            s: setting.run("muon", rates, s, weight_decay=0.0, measure_every=often["short"], **measured) for s in seeds
        },
        **{
            f"long, {name}": {
                s: setting.run("muon", rates, s, long, weight_decay=decay, measure_every=often["long"], **measured)
                for s in seeds
            }
            for name, decay in (("decay", DECAY), ("none", 0.0))
        },
    }
    outcomes, diverged = without_diverged(laboratory.do_arms(arms))
    losses = losses_of(outcomes)
    curves = {arm: {seed: mean_rms(one) for seed, one in by_seed.items()} for arm, by_seed in outcomes.items()}
    return {
        "tuning": tuning_as_json(tuned),
        "diverged": diverged,
        "long_steps": long,
        "val_loss": losses,
        "weight_rms": curves,
        "summary": summarize(losses, curves),
    }


def mean_rms(outcome: Outcome) -> Curve:
    """The weight RMS, averaged over the hidden parameters, at every step that was measured."""
    keys = [f"{PREFIX}{name}" for name in parameters(outcome.last(PREFIX))]
    curves = [outcome.curve(key) for key in keys]
    return [(points[0][0], fmean(value for _, value in points)) for points in zip(*curves, strict=True)]


def summarize(losses: Mapping[str, Mapping[int, float]], curves: Mapping[str, Mapping[int, Curve]]) -> dict[str, Any]:
    """For each length the loss without decay minus that with it, and by how much larger the weights end; for each decay
    by how much larger they end in the long run than in the short one. Of arms that did not diverge.
    """
    found: dict[str, Any] = {}
    for name in NAMES:
        short, long = (curves.get(f"{length}, {name}") for length in LENGTHS)
        if short is not None and long is not None:
            found[f"long over short, {name}"] = {seed: long[seed][-1][1] / short[seed][-1][1] for seed in short}
    for length in LENGTHS:
        decay, none = f"{length}, decay", f"{length}, none"
        if not {decay, none} <= losses.keys():
            continue
        growth = [curves[none][seed][-1][1] / curves[decay][seed][-1][1] for seed in curves[none]]
        spread = Spread.of(growth)
        found[length] = {
            "none_minus_decay": paired(losses[none], losses[decay]).asdict(),
            "rms_ratio_mean": spread.mean,
            "rms_ratio_sd": spread.sd,
        }
    return found


def tables(results: Results) -> str:
    """The results in Markdown."""
    rows = []
    for length, steps in zip(LENGTHS, (results["steps"], results["long_steps"]), strict=True):
        compared_at = results["summary"].get(length)
        for name, said in zip(NAMES, (f"{DECAY:g}", "0"), strict=True):
            arm = f"{length}, {name}"
            if arm not in results["val_loss"]:
                rows.append([str(steps), said, "diverged", "", "", "", ""])
                continue
            losses = Spread.of(list(results["val_loss"][arm].values())).text()
            rms = Spread.of([curve[-1][1] for curve in results["weight_rms"][arm].values()]).text(4)
            compared = ["", "", ""]
            if name == "none" and compared_at is not None:
                difference = compared_at["none_minus_decay"]
                below = f"{difference['seeds_below']} of {len(difference['differences'])}"
                compared = [number(difference["mean"], 4, sign=True), below, p_value(difference["p_below"])]
            rows.append([str(steps), said, losses, rms, *compared])
    header = ["steps", "decay", "loss", "weight RMS at the end", "minus with decay", "seeds below", "p of below"]
    return table(header, rows) + "\n\n" + "\n".join(findings(results))


def findings(results: Results) -> list[str]:
    """What was seen of the claims, and what was not."""
    summary, seeds, said = results["summary"], len(results["seeds"]), diverged_text(results)
    growth = {name: list(summary.get(f"long over short, {name}", {}).values()) for name in NAMES}
    if none := growth["none"]:
        more = "".join(
            f" After {steps} steps they are {number(summary[length]['rms_ratio_mean'], 2)} times as large as with"
            " decay."
            for length, steps in zip(LENGTHS, (results["steps"], results["long_steps"]), strict=True)
            if length in summary
        )
        with_decay = f", with decay {number(fmean(growth['decay']), 2)} times" if growth["decay"] else ""
        said.append(
            f"- {verdict(min(none) > 1)}: without decay the weights grow on. After {results['long_steps']} steps they"
            f" are {number(fmean(none), 2)} times as large as after {results['steps']}{with_decay}; larger in"
            f" {sum(one > 1 for one in none)} of {seeds} seeds.{more}"
        )
    if not set(LENGTHS) <= summary.keys():
        return said
    short, long = (summary[length]["none_minus_decay"] for length in LENGTHS)
    crossed = short["seeds_below"] == seeds and long["seeds_above"] == seeds
    said.append(
        f"- {verdict(crossed)}: no decay is better in the short run and worse in the long one. It is better in"
        f" {short['seeds_below']} of {seeds} seeds in the short run, and worse in {long['seeds_above']} of {seeds} in"
        " the long one."
    )
    return said


def draw(results: Results, path: Path) -> None:
    """Growth of the weights, and the difference of the losses."""
    with panels(path, 2) as (growth, losses):
        for name, colour, label in (("decay", MUON, f"decay {DECAY:g}"), ("none", ADAMW, "no decay")):
            for length, style in (("short", "--"), ("long", "-")):
                curves = list(results["weight_rms"].get(f"{length}, {name}", {}).values())
                if not curves:
                    continue
                steps = [step for step, _ in curves[0]]
                values = [[value for _, value in curve] for curve in curves]
                label_of = f"{label}, {steps[-1]} steps"
                with_seeds(growth, steps, values, color=colour, linestyle=style, marker="", label=label_of)
        frame(growth, "optimizer step", "weight RMS, mean over hidden parameters", "growth of the weights")
        growth.set_ylim(bottom=0)
        growth.legend(frameon=False, fontsize=8)
        x = dict(zip(LENGTHS, (results["steps"], results["long_steps"]), strict=True))
        for length in (one for one in LENGTHS if one in results["summary"]):
            found: list[float] = list(results["summary"][length]["none_minus_decay"]["differences"].values())
            with_seeds(losses, [x[length]], [[one] for one in found], color=ADAMW, linestyle="")
        losses.axhline(0, color="black", linewidth=0.8)
        frame(
            losses,
            "steps of the run",
            "loss without decay minus with it, nats per byte",
            "seeds and mean; below zero, no decay is better",
        )
        losses.set_xticks(list(x.values()))


if __name__ == "__main__":
    main(__doc__, NAME, experiment, tables, draw, seeds=SEEDS[:3])
