"""Muon with and without weight decay: how the weights grow, and which is better, soon and later (Moonlight, §2.2).

``python -m benchmarks.claims.weight_decay [--json benchmarks/results/weight_decay.json]
[--picture docs/pictures/weight_decay.png]``

A run at the usual length and one five times as long, each with a schedule of its own, at the learning rates that were
best at the usual length with a decay of 0.1. A crossover is said to be seen only if the runs without decay are
better in every seed at one length and worse in every seed at the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.claims.command import Results, main, tuning_as_json
from benchmarks.claims.figure import ADAMW, MUON, frame, panels, with_seeds
from benchmarks.claims.kinds import parameters
from benchmarks.claims.laboratory import Laboratory, losses_of
from benchmarks.claims.markdown import number, p_value, table
from benchmarks.claims.paired import Spread, paired
from benchmarks.claims.run import Outcome
from benchmarks.claims.setting import SEEDS

NAME = "weight_decay"
DECAY, LONG = 0.1, 5
LENGTHS = ("short", "long")
PREFIX = "muon/weight_rms/"

Curve = list[tuple[int, float]]  # step, value


def experiment(laboratory: Laboratory) -> Results:
    """With and without decay, short and long."""
    setting, seeds = laboratory.setting, laboratory.seeds
    tuned = laboratory.tune()
    rates, long = tuned["muon"].best, LONG * setting.steps
    measured: dict[str, Any] = {"measure": ("weights",)}
    often = {length: max(1, steps // 10) for length, steps in (("short", setting.steps), ("long", long))}
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
    outcomes = laboratory.do_arms(arms)
    losses = losses_of(outcomes)
    curves = {arm: {seed: mean_rms(one) for seed, one in by_seed.items()} for arm, by_seed in outcomes.items()}
    return {
        "tuning": tuning_as_json(tuned),
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


def summarize(
    losses: Mapping[str, Mapping[int, float]], curves: Mapping[str, Mapping[int, Curve]]
) -> dict[str, dict[str, Any]]:
    """For each length: the loss without decay minus that with it, and by how much larger the weights end."""
    found = {}
    for length in LENGTHS:
        decay, none = f"{length}, decay", f"{length}, none"
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
        difference = results["summary"][length]["none_minus_decay"]
        for name, said in (("decay", f"{DECAY:g}"), ("none", "0")):
            arm = f"{length}, {name}"
            losses = Spread.of(list(results["val_loss"][arm].values())).text()
            rms = Spread.of([curve[-1][1] for curve in results["weight_rms"][arm].values()]).text(4)
            compared = ["", "", ""]
            if name == "none":
                below = f"{difference['seeds_below']} of {len(difference['differences'])}"
                compared = [number(difference["mean"], 4, sign=True), below, p_value(difference["p_below"])]
            rows.append([str(steps), said, losses, rms, *compared])
    header = ["steps", "decay", "loss", "weight RMS at the end", "minus with decay", "seeds below", "p of below"]
    return table(header, rows) + "\n\n" + "\n".join(findings(results))


def findings(results: Results) -> list[str]:
    """What was seen of the claims, and what was not."""
    short, long = (results["summary"][length] for length in LENGTHS)
    seeds = len(results["seeds"])
    grows = long["rms_ratio_mean"] > short["rms_ratio_mean"] > 1
    said = [
        f"- {'Seen' if grows else 'Not seen'}: without decay the weights grow on. They end"
        f" {number(short['rms_ratio_mean'], 2)} times as large as with it after {results['steps']} steps, and"
        f" {number(long['rms_ratio_mean'], 2)} times after {results['long_steps']}."
    ]
    early, late = short["none_minus_decay"]["seeds_below"], long["none_minus_decay"]["seeds_below"]
    crossed = early == seeds and late == 0
    said.append(
        f"- {'Seen' if crossed else 'Not seen'}: no decay is better in the short run and worse in the long one. It is"
        f" better in {early} of {seeds} seeds in the short run, and in {late} of {seeds} in the long one."
    )
    return said


def draw(results: Results, path: Path) -> None:
    """Growth of the weights, and the difference of the losses."""
    with panels(path, 2) as (growth, losses):
        for name, colour, label in (("decay", MUON, f"decay {DECAY:g}"), ("none", ADAMW, "no decay")):
            for length, style in (("short", "--"), ("long", "-")):
                curves = list(results["weight_rms"][f"{length}, {name}"].values())
                steps = [step for step, _ in curves[0]]
                values = [[value for _, value in curve] for curve in curves]
                label_of = f"{label}, {steps[-1]} steps"
                with_seeds(growth, steps, values, color=colour, linestyle=style, marker="", label=label_of)
        frame(growth, "optimizer step", "weight RMS, mean over hidden parameters", "growth of the weights")
        growth.set_ylim(bottom=0)
        growth.legend(frameon=False, fontsize=8)
        x = [results["steps"], results["long_steps"]]
        found = [results["summary"][length]["none_minus_decay"]["differences"] for length in LENGTHS]
        differences = [[one[seed] for one in found] for seed in found[0]]
        with_seeds(losses, x, differences, color=ADAMW, linestyle="")  # between the two lengths nothing is known
        losses.axhline(0, color="black", linewidth=0.8)
        frame(
            losses,
            "steps of the run",
            "loss without decay minus with it, nats per byte",
            "seeds and mean; below zero, no decay is better",
        )
        losses.set_xticks(x)


if __name__ == "__main__":
    main(__doc__, NAME, experiment, tables, draw, seeds=SEEDS[:3])
