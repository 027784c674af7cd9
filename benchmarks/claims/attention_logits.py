"""Attention's largest logits under Muon and AdamW, and what QK-Clip does and costs (Kimi K2, §2.1).

``python -m benchmarks.claims.attention_logits [--json benchmarks/results/attention_logits.json]
[--picture docs/pictures/attention_logits.png]``

Both optimizers at the learning rates that were best at the usual initial scale, and with that of the matrices four
times as high, in a model without QK-norm; at the high rate, Muon with `lightning_muon.QKClip` as well: with a τ that
is low enough to bite in so small a model, and with the usual 100. What clipping costs is the paired difference of the
losses, beside the spread over seeds. At another initial scale both the logits and the cost are others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.claims.command import Results, diverged_text, main, tuning_as_json
from benchmarks.claims.figure import ADAMW, MUON, OTHER, THIRD, frame, panels, with_seeds
from benchmarks.claims.laboratory import SEARCHES_AT_USUAL_SCALE, Laboratory, losses_of, without_diverged
from benchmarks.claims.markdown import number, p_value, table, verdict
from benchmarks.claims.paired import Spread, paired
from benchmarks.claims.run import Outcome
from benchmarks.claims.setting import SEEDS, interval

NAME = "attention_logits"
HIGH = 4
TAUS = (10.0, 100.0)  # one that bites here, and the usual one
PREFIX = "attention/max_logit/"
MUON_HIGH, ADAMW_HIGH = "Muon, high rate", "AdamW, high rate"

Curve = list[tuple[int, float]]  # step, value


def clipped_arm(tau: float) -> str:
    """Its name."""
    return f"{MUON_HIGH}, τ = {tau:g}"


def experiment(laboratory: Laboratory) -> Results:
    """The runs, and the largest logits at every step that was measured."""
    setting, seeds, tuned = laboratory.setting, laboratory.seeds, laboratory.tune(SEARCHES_AT_USUAL_SCALE)
    muon, adamw = tuned["muon"].best, tuned["adamw"].best
    common: dict[str, Any] = {"watch_logits": True, "measure_every": interval(setting.steps, 20)}
    arms = {
        "AdamW": {s: setting.run("adamw", adamw, s, **common) for s in seeds},
        "Muon": {s: setting.run("muon", muon, s, **common) for s in seeds},
        ADAMW_HIGH: {s: setting.run("adamw", adamw.times(HIGH), s, **common) for s in seeds},
        MUON_HIGH: {s: setting.run("muon", muon.times(HIGH), s, **common) for s in seeds},
        **{
            clipped_arm(tau): {s: setting.run("muon", muon.times(HIGH), s, clip_tau=tau, **common) for s in seeds}
            for tau in TAUS
        },
    }
    outcomes, diverged = without_diverged(laboratory.do_arms(arms))
    losses = losses_of(outcomes)
    logits = {
        arm: {seed: one.curve(f"{PREFIX}_max") for seed, one in by_seed.items()} for arm, by_seed in outcomes.items()
    }
    heads = {arm: {seed: of_heads(one) for seed, one in by_seed.items()} for arm, by_seed in outcomes.items()}
    clipped = {
        arm: {seed: share_clipped(one, len(heads[arm][seed])) for seed, one in by_seed.items()}
        for arm, by_seed in outcomes.items()
        if arm in map(clipped_arm, TAUS)
    }
    return {
        "tuning": tuning_as_json(tuned),
        "diverged": diverged,
        "val_loss": losses,
        "largest_logit": logits,
        "heads_at_the_end": heads,
        "share_of_heads_clipped": clipped,
        "summary": summarize(losses, logits),
    }


def of_heads(outcome: Outcome) -> dict[str, float]:
    """The largest logit of every head at the last measurement, by module and head."""
    return {name: value for name, value in outcome.last(PREFIX).items() if name.rpartition(".")[2].isdecimal()}


def share_clipped(outcome: Outcome, heads: int) -> float:
    """Of the heads, how many were clipped between two measurements, averaged over the run."""
    names = outcome.last("attention/clipped_heads/")
    curves = [outcome.curve(f"attention/clipped_heads/{name}") for name in names]
    return fmean(sum(value for _, value in points) for points in zip(*curves, strict=True)) / heads


def summarize(losses: Mapping[str, Mapping[int, float]], logits: Mapping[str, Mapping[int, Curve]]) -> dict[str, Any]:
    """The largest logit of each run, Muon's against AdamW's, and the cost of clipping; of arms that did not diverge."""
    largest = {arm: {s: max(v for _, v in curve) for s, curve in of.items()} for arm, of in logits.items()}
    pairs = {"tuned rates": ("Muon", "AdamW"), "high rates": (MUON_HIGH, ADAMW_HIGH)}
    taus = [tau for tau in TAUS if {clipped_arm(tau), MUON_HIGH} <= losses.keys()]
    return {
        "largest": largest,
        "muon_minus_adamw": {
            rates: paired(largest[muon], largest[adamw]).asdict()
            for rates, (muon, adamw) in pairs.items()
            if {muon, adamw} <= largest.keys()
        },
        "seed_sd_of_the_loss": Spread.of(list(losses[MUON_HIGH].values())).sd if MUON_HIGH in losses else None,
        "cost_of_clipping": {f"{t:g}": paired(losses[clipped_arm(t)], losses[MUON_HIGH]).asdict() for t in taus},
    }


def tables(results: Results) -> str:
    """The results in Markdown."""
    rows = []
    for arm, losses in results["val_loss"].items():
        largest = Spread.of(list(results["summary"]["largest"][arm].values())).text(1)
        last = Spread.of([curve[-1][1] for curve in results["largest_logit"][arm].values()]).text(1)
        heads = [median(one.values()) for one in results["heads_at_the_end"][arm].values()]
        clipped = results["share_of_heads_clipped"].get(arm)
        share = "" if clipped is None else f"{100 * fmean(clipped.values()):.0f} %"
        rows.append([arm, Spread.of(list(losses.values())).text(), largest, last, Spread.of(heads).text(1), share])
    header = ["", "loss", "largest logit in the run", "at the end", "of the median head", "heads clipped"]
    costs = [
        [f"τ = {tau}", number(one["mean"], 4, sign=True), number(one["standard_error"], 4),
         f"{one['seeds_below']} of {len(one['differences'])}", p_value(one["p_below"])]
        for tau, one in results["summary"]["cost_of_clipping"].items()
    ]  # fmt: skip
    return "\n\n".join(
        [
            table(header, rows),
            table(["loss with QK-Clip minus without", "mean", "standard error", "seeds below", "p of below"], costs),
            "\n".join(findings(results)),
        ]
    )


def findings(results: Results) -> list[str]:
    """What was seen of the claims, and what was not."""
    summary, said = results["summary"], diverged_text(results)
    for rates, one in summary["muon_minus_adamw"].items():
        number_of_seeds, above = len(one["differences"]), one["seeds_above"]
        said.append(
            f"- {verdict(above == number_of_seeds)}, at {rates}: attention's largest logit grows more under Muon"
            f" than under AdamW. It does in {above} of {number_of_seeds} seeds; the mean difference is"
            f" {number(one['mean'], 1, sign=True)}."
        )
    noise = summary["seed_sd_of_the_loss"]
    for tau, one in summary["cost_of_clipping"].items():
        bites = fmean(results["share_of_heads_clipped"][clipped_arm(float(tau))].values()) > 0
        if not bites:
            said.append(f"- τ = {tau} never clipped anything.")
        elif noise is not None:
            above = None if one["p_below"] is None else 1 - one["p_below"]
            said.append(
                f"- {verdict(one['mean'] < noise)}: clipping with τ = {tau} costs less than the noise of the"
                f" seeds. It changes the loss by {number(one['mean'], 4, sign=True)} in the mean, where the seeds'"
                " standard deviation is"
                f" {number(noise, 4)}; by the paired differences, p = {p_value(above)} for a cost above zero."
            )
    return said


def draw(results: Results, path: Path) -> None:
    """The largest logit over the steps: both optimizers, and Muon clipped."""
    bite = clipped_arm(TAUS[0])
    styles = {
        "AdamW": {"color": ADAMW, "linestyle": "--"},
        "Muon": {"color": MUON, "linestyle": "--"},
        ADAMW_HIGH: {"color": ADAMW},
        MUON_HIGH: {"color": MUON},
        bite: {"color": THIRD},
    }
    shown = {arm: style for arm, style in styles.items() if arm in results["largest_logit"]}
    with panels(path, 2) as (over_steps, over_heads):
        for arm, style in shown.items():
            curves = list(results["largest_logit"][arm].values())
            steps = [step for step, _ in curves[0]]
            values = [[value for _, value in curve] for curve in curves]
            with_seeds(over_steps, steps, values, marker="", label=arm, **style)
        over_steps.set_yscale("log")
        over_steps.yaxis.set_major_formatter("{x:g}")
        frame(over_steps, "optimizer step", "largest attention logit", "largest logit of all heads: mean and seeds")
        over_steps.legend(frameon=False, fontsize=8)
        for place, (arm, style) in enumerate(shown.items()):
            last = results["heads_at_the_end"][arm]
            heads: list[float] = [value for one in last.values() for value in one.values()]
            over_heads.plot([place] * len(heads), heads, linestyle="", marker=".", color=style["color"], alpha=0.7)
            over_heads.plot([place], [median(heads)], marker="_", markersize=20, color=OTHER)
        over_heads.set_xticks(range(len(shown)), list(shown), rotation=25, ha="right", fontsize=8)
        over_heads.set_ylim(bottom=0)
        frame(over_heads, "", "largest logit of a head", "every head of every seed at the end; bars are medians")


if __name__ == "__main__":
    main(__doc__, NAME, experiment, tables, draw, seeds=SEEDS[:3])
