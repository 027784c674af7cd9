"""The size of Muon's update: how large it should be, and what it should depend on (Moonlight, Tables 8 and 1).

``python -m benchmarks.claims.scale_rule [--json benchmarks/results/scale_rule.json]
[--picture docs/pictures/scale_rule.png]``

Table 8: Muon with update RMS 0.05 to 0.8, at AdamW's tuned learning rates and at its own, with weight decay as it was;
both are those that were best at the usual initial scale.
Table 1: a dense model with inner layers four times as wide, and three rules for the factor on the update: 0.2·√H for
all matrices, 0.2/RMS(O), and 0.2·√max(rows, cols); with the paper's iteration (``keller5``), at Muon's tuned learning
rates, which are those of the usual model with the last rule: none is tuned for itself. AdamW's own update RMS, which
the factor 0.2 is to match, is measured in AdamW's tuned runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.claims.command import Results, diverged_text, main, tuning_as_json
from benchmarks.claims.figure import ADAMW, MUON, THIRD, frame, panels, with_seeds
from benchmarks.claims.kinds import parameters
from benchmarks.claims.laboratory import SEARCHES_AT_USUAL_SCALE, Arms, Laboratory, losses_of, without_diverged
from benchmarks.claims.markdown import number, table, verdict
from benchmarks.claims.paired import Spread, paired
from benchmarks.claims.run import Outcome
from benchmarks.claims.setting import MODEL, SEEDS

NAME = "scale_rule"
TARGETS = (0.05, 0.1, 0.2, 0.4, 0.8)
RATES = {"adamw": "AdamW's rates", "muon": "Muon's rates"}
RULES = {"baseline": "0.2·√H", "update_norm": "0.2/RMS(O)", "adjusted": "0.2·√max"}
CLAIMED_BEST = (0.2, 0.4)
CLAIMED_RMS = (0.18, 0.30)
ATTENTION_Q, MLP = r"self_attn\.q_proj", r"mlp\.(experts\.|shared_experts\.)?(gate|up|down)_proj"
WIDE = {
    **MODEL,
    "attention": "gqa",
    "num_key_value_heads": 2,
    "head_dim": 32,
    "first_k_dense_replace": MODEL["num_hidden_layers"],
    "intermediate_size": 4 * MODEL["hidden_size"],
}


def arm_of(rates: str, target: float) -> str:
    """The name of one of Table 8's."""
    return f"{RATES[rates]}, {target:g}"


def experiment(laboratory: Laboratory) -> Results:
    """All runs of both tables."""
    setting, seeds, tuned = laboratory.setting, laboratory.seeds, laboratory.tune(SEARCHES_AT_USUAL_SCALE)
    arms = {"AdamW": setting.reported("adamw", tuned["adamw"].best, seeds)}
    for rates in RATES:
        for target in TARGETS:
            arms[arm_of(rates, target)] = {
                s: setting.run("muon", tuned[rates].best, s, update_rms=target, measure=("weights",)) for s in seeds
            }
    for rule, name in RULES.items():
        fields: dict[str, Any] = {"scale_rule": rule, "model": dict(WIDE), "orthogonalization": "keller5"}
        arms[name] = {s: setting.run("muon", tuned["muon"].best, s, measure=("weights",), **fields) for s in seeds}
    outcomes, diverged = without_diverged(laboratory.do_arms(arms))
    return {
        "tuning": tuning_as_json(tuned),
        "diverged": diverged,
        "val_loss": losses_of(outcomes),
        "train_loss": {
            arm: {s: one.figures["train_loss"] for s, one in by_seed.items()} for arm, by_seed in outcomes.items()
        },
        "query_rms": _mean_rms(outcomes, ATTENTION_Q),
        "mlp_rms": _mean_rms(outcomes, MLP),
        "adamw_update_rms": {s: update_rms(one) for s, one in outcomes.get("AdamW", {}).items()},
        "targets": {rates: compare_targets(losses_of(outcomes), rates) for rates in RATES},
        "rules": compare_rules(losses_of(outcomes)),
    }


def _mean_rms(arms: Arms, pattern: str) -> dict[str, dict[int, float]]:
    """The weight RMS at the end, averaged over the parameters whose names the pattern is in."""
    return {arm: {s: mean_rms(one, pattern) for s, one in by_seed.items()} for arm, by_seed in arms.items()}


def mean_rms(outcome: Outcome, pattern: str) -> float:
    """The same of one run."""
    values = parameters(outcome.last("muon/weight_rms/"))
    return fmean(value for name, value in values.items() if re.search(pattern, name))


def update_rms(outcome: Outcome) -> dict[str, Any]:
    """The update RMS of the hidden parameters: at every measured step the median, and at the last all of them."""
    prefix = "muon/update_rms/"
    last = parameters(outcome.last(prefix))
    curves = [outcome.curve(f"{prefix}{name}") for name in last]
    medians = [(points[0][0], median(value for _, value in points)) for points in zip(*curves, strict=True)]
    return {"median": medians, "at_the_end": last}


def compare_targets(losses: Mapping[str, Mapping[int, float]], rates: str) -> dict[str, Any]:
    """Of Table 8: the loss at each claimed RMS minus that at each other; of arms that did not diverge."""
    arms = {target: losses[arm_of(rates, target)] for target in TARGETS if arm_of(rates, target) in losses}
    return {
        f"{best:g} - {other:g}": paired(arms[best], arms[other]).asdict()
        for best in CLAIMED_BEST
        for other in arms
        if best in arms and other not in CLAIMED_BEST
    }


def compare_rules(losses: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """Of Table 1: every rule's loss minus that of 0.2·√max."""
    usual = RULES["adjusted"]
    others = [name for name in RULES.values() if name != usual and {name, usual} <= losses.keys()]
    return {name: paired(losses[name], losses[usual]).asdict() for name in others}


def tables(results: Results) -> str:
    """The results in Markdown."""
    targets = [f"{target:g}" for target in TARGETS]
    first = table(["Table 8: update RMS", "AdamW", *targets], [
        _line(results, f"{what}, {said}", key, ["AdamW", *(arm_of(rates, target) for target in TARGETS)], digits)
        for rates, said in RATES.items()
        for key, what, digits in _ROWS
    ])  # fmt: skip
    second = table(["Table 1: factor", *RULES.values()], [
        _line(results, what, key, list(RULES.values()), digits) for key, what, digits in _ROWS
    ])  # fmt: skip
    return "\n\n".join([first, second, "\n".join(findings(results))])


_ROWS = (
    ("train_loss", "training loss", 3),
    ("val_loss", "validation loss", 3),
    ("query_rms", "query weight RMS", 4),
    ("mlp_rms", "MLP weight RMS", 4),
)


def _line(results: Results, name: str, key: str, arms: Sequence[str], digits: int) -> list[str]:
    found = results[key]
    return [name, *(Spread.of(list(found[a].values())).text(digits) if a in found else "diverged" for a in arms)]


def _mean(results: Results, key: str, arm: str) -> float | None:
    return fmean(results[key][arm].values()) if arm in results[key] else None


def findings(results: Results) -> list[str]:
    """What was seen of the claims, and what was not."""
    said = diverged_text(results)
    for rates, of in RATES.items():
        losses = {target: _mean(results, "val_loss", arm_of(rates, target)) for target in TARGETS}
        known = {target: loss for target, loss in losses.items() if loss is not None}
        if not known:
            continue
        best = min(known, key=lambda target: known[target])
        if rates == "muon":
            said.append(f"- At {of} the best mean is at {best:g}. This is no test: {_NO_TEST}.")
            continue
        differences = results["targets"][rates]
        others = len(CLAIMED_BEST) * (len(TARGETS) - len(CLAIMED_BEST))
        sure = sum(one["seeds_below"] == len(one["differences"]) for one in differences.values())
        said.append(
            f"- {verdict(sure == others)}, at {of}: update RMS 0.2 and 0.4 are each better than 0.05, 0.1 and 0.8, in"
            f" every seed. {sure} of the {others} comparisons are below in every seed; the best mean is at {best:g}."
        )
    medians = [one["median"] for one in results["adamw_update_rms"].values()]
    if medians:
        low, high = CLAIMED_RMS
        every = [value for curve in medians for _, value in curve]
        ends = [curve[-1][1] for curve in medians]
        for when, values in (("at the end of training", ends), ("at every measured step", every)):
            is_between = all(low <= value <= high for value in values)
            said.append(
                f"- {verdict(is_between)}: AdamW's update RMS, its median over hidden parameters, is between"
                f" {low:.2f} and {high:.2f} {when}. It is {Spread.of(values).text()}, and {min(values):.3f} to"
                f" {max(values):.3f}."
            )
    for what, key, factors, paper in (("MLP's", "mlp_rms", 2, 1.94), ("queries'", "query_rms", 1, 0.97)):
        own, common = (_mean(results, key, RULES[rule]) for rule in ("adjusted", "baseline"))
        if own is not None and common is not None:
            said.append(
                f"- The {what} weights end {own / common:.2f} times as large with {RULES['adjusted']} as with"
                f" {RULES['baseline']}, where the factors' ratio is {factors} and the paper has {paper:.2f}."
            )
    for name, one in results["rules"].items():
        seeds, claim = len(one["differences"]), ""
        if name == RULES["baseline"]:
            claim = f"{verdict(one['seeds_above'] == seeds)}: one factor for all shapes is worse, in every seed. "
        said.append(
            f"- {claim}With {name} the loss differs by {number(one['mean'], 4, sign=True)} ±"
            f" {number(one['standard_error'], 4)} (standard error) from that with {RULES['adjusted']}; above in"
            f" {one['seeds_above']} of {seeds} seeds."
        )
    return said


_NO_TEST = "another RMS is another learning rate, and this row is the tuning grid of that rate once more"


def draw(results: Results, path: Path) -> None:
    """Loss and weight RMS over the update RMS, and AdamW's update RMS over the steps."""
    with panels(path, 3, width=4.4) as (loss, weights, updates):
        for rates, colour in (("adamw", ADAMW), ("muon", MUON)):
            known = [target for target in TARGETS if arm_of(rates, target) in results["val_loss"]]
            for axes, key in ((loss, "val_loss"), (weights, "mlp_rms")):
                arms = [results[key][arm_of(rates, target)] for target in known]
                values = [[arm[seed] for arm in arms] for seed in map(str, results["seeds"])]
                with_seeds(axes, list(known), values, color=colour, label=f"Muon at {RATES[rates]}")
        for axes, key in ((loss, "val_loss"), (weights, "mlp_rms")):
            adamw = _mean(results, key, "AdamW")
            if adamw is not None:
                axes.axhline(adamw, color="black", linewidth=1, linestyle=":", label="AdamW")
            axes.set_xscale("log")
            axes.set_xticks(TARGETS, [f"{target:g}" for target in TARGETS])
            axes.minorticks_off()
        frame(loss, "update RMS", "validation loss, nats per byte", "how large the update should be")
        loss.legend(frameon=False, fontsize=8)
        weights.set_yscale("log")
        weights.set_yticks((0.05, 0.1, 0.2, 0.5), ("0.05", "0.1", "0.2", "0.5"))
        weights.minorticks_off()
        frame(weights, "update RMS", "MLP weight RMS at the end", "what that does to the weights")
        low, high = CLAIMED_RMS
        updates.axhspan(low, high, color=THIRD, alpha=0.15, linewidth=0, label=f"{low:.2f} to {high:.2f}")
        curves = [one["median"] for one in results["adamw_update_rms"].values()]
        if curves:
            values = [[value for _, value in curve] for curve in curves]
            with_seeds(updates, [step for step, _ in curves[0]], values, color=ADAMW, label="median of hidden")
        updates.set_ylim(bottom=0)
        frame(updates, "optimizer step", "update RMS", "AdamW's own, tuned")
        updates.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main(__doc__, NAME, experiment, tables, draw, seeds=SEEDS[:3])
