"""Loss against compute over a ladder of sizes, for Muon and AdamW, and the compute at which both reach one loss.

``python -m benchmarks.claims.scaling_law [--json benchmarks/results/scaling_law.json]
[--picture docs/pictures/scaling_law.png] [--widths 32 48 64 80 96]``

Models of one kind that grow with their width, tokens in proportion to the active parameters. Both optimizers are tuned
at the sizes up to ``--tune-up-to`` by the search of `steps_to_loss`, on a seed that is not reported; a larger size
takes the rates where the trend of the tuned ones leads, log-linear in the width. Compute counts forward and backward,
not the optimizer's step. To each optimizer's runs a power law ``L = c · C^-α`` is fitted, as Moonlight does.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.command import Results, main, tuning_as_json
from benchmarks.claims.compute_ratio import compute_ratios, published_ratio
from benchmarks.claims.description import Run
from benchmarks.claims.figure import ADAMW, MUON, frame, panels
from benchmarks.claims.laboratory import Laboratory
from benchmarks.claims.markdown import number, table
from benchmarks.claims.paired import Spread
from benchmarks.claims.setting import TUNING_SEED
from benchmarks.claims.trend import rates_at
from benchmarks.claims.tuning import Rates, Tuned, tune
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.flops import flops_per_token
from lightning_muon.scaling.law import PowerLaw, fit_power_law

NAME = "scaling_law"
WIDTHS = (32, 48, 64, 80, 96)
TUNE_UP_TO = 64
WIDTH_OF_STEPS = 64  # the size that trains for the setting's number of steps
OPTIMIZERS = ("muon", "adamw")
LABELS = {"muon": "Muon", "adamw": "AdamW"}
PFLOP_S_DAY = 1e15 * 24 * 3600

Losses = Mapping[int, Mapping[int, float]]  # by width and seed


def geometry(width: int) -> dict[str, Any]:
    """Fields of `ModelConfig`: heads of one size in proportion to the width, everything else in proportion to it."""
    return {
        "hidden_size": width,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": width // 16,
        "attention": "gqa",
        "num_key_value_heads": width // 16,
        "head_dim": 16,
        "intermediate_size": 4 * width,
        "moe_intermediate_size": width,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "max_seq_len": 64,
    }


def active_parameters(width: int) -> int:
    """Without embedding and head."""
    return ModelConfig(**geometry(width)).num_parameters(embeddings=False).active


def num_steps(width: int, steps: int) -> int:
    """As many as make tokens proportional to the active parameters, ``steps`` at `WIDTH_OF_STEPS`."""
    return max(2, round(steps * active_parameters(width) / active_parameters(WIDTH_OF_STEPS)))


def compute(run: Run) -> float:
    """Of a run, in PFLOP/s-days."""
    config = ModelConfig(**run.model)
    return run.steps * run.batch_size * run.seq_len * flops_per_token(config, run.seq_len) / PFLOP_S_DAY


def experiment(laboratory: Laboratory) -> Results:
    """Tunes the smaller sizes, and does the runs that are reported."""
    options = laboratory.options
    widths = sorted(options.widths)
    tuned = {width: _tune(laboratory, width) for width in widths if width <= options.tune_up_to}
    rates = {
        (optimizer, width): rates_at(width, {w: found[optimizer].best for w, found in tuned.items()})
        for optimizer in OPTIMIZERS
        for width in widths
    }
    arms = {
        f"{optimizer}-{width}": {seed: _run_of(laboratory, optimizer, width, rate, seed) for seed in laboratory.seeds}
        for (optimizer, width), rate in rates.items()
    }
    done = laboratory.do_arms(arms)
    losses = {
        optimizer: {
            width: {seed: outcome.val_loss for seed, outcome in done[f"{optimizer}-{width}"].items()}
            for width in widths
        }
        for optimizer in OPTIMIZERS
    }
    first = laboratory.seeds[0]
    sizes = {width: compute(arms[f"muon-{width}"][first]) for width in widths}
    return {
        "tuning": tuning_as_json(
            {f"{LABELS[name]} at width {w}": one for w, found in tuned.items() for name, one in found.items()}
        ),
        "sizes": [
            {
                "width": width,
                "active_parameters": active_parameters(width),
                "steps": num_steps(width, laboratory.setting.steps),
                "pflop_s_days": sizes[width],
                "rates": {optimizer: list(rates[optimizer, width]) for optimizer in OPTIMIZERS},
                "is_tuned": width in tuned,
            }
            for width in widths
        ],
        "val_loss": losses,
        **summarize(sizes, losses["muon"], losses["adamw"]),
    }


def _tune(laboratory: Laboratory, width: int) -> dict[str, Tuned]:
    def losses_of(points: Sequence[tuple[str, Rates]]) -> list[float]:
        runs = [_run_of(laboratory, optimizer, width, rates, TUNING_SEED) for optimizer, rates in points]
        return [outcome.val_loss for outcome in laboratory.do(runs)]

    return tune(dict.fromkeys(OPTIMIZERS, laboratory.grid), losses_of, laboratory.max_growths)


def _run_of(laboratory: Laboratory, optimizer: str, width: int, rates: Rates, seed: int) -> Run:
    setting = laboratory.setting
    return setting.run(optimizer, rates, seed, num_steps(width, setting.steps), model=geometry(width))


def summarize(sizes: Mapping[int, float], muon: Losses, adamw: Losses) -> Results:
    """The two laws, and Muon's compute over AdamW's at equal loss.

    Args:
        sizes: Compute by width, in PFLOP/s-days.
        muon: Losses by width and seed.
        adamw: The same.
    """
    found: Results = {"laws": {name: _law(fit(sizes, losses)) for name, losses in (("muon", muon), ("adamw", adamw))}}
    found["compute_ratio"] = [
        {"width": width, "pflop_s_days": sizes[width], **ratio}
        for width, ratio in compute_ratios(sizes, muon, adamw).items()
    ]
    found["published"] = {str(c): published_ratio(c) for c in (1.0, 3.0, 10.0, 18.0)}
    return found


def fit(sizes: Mapping[int, float], losses: Losses) -> PowerLaw:
    """Of all seeds' losses over compute."""
    points = [(sizes[width], loss) for width, by_seed in losses.items() for loss in by_seed.values()]
    return fit_power_law([c for c, _ in points], [loss for _, loss in points])


def _law(law: PowerLaw) -> Results:
    def interval(estimate: Any) -> list[float]:
        return [estimate.value, estimate.low, estimate.high]

    return {
        "coefficient": interval(law.coefficient),
        "exponent": interval(law.exponent),
        "r_squared": law.r_squared,
        "warnings": law.warnings(),
    }


def tables(results: Results) -> str:
    """The results in Markdown."""
    rows = []
    for size in results["sizes"]:
        width = str(size["width"])
        muon, adamw = (list(results["val_loss"][name][width].values()) for name in OPTIMIZERS)
        rates = ["; ".join([f"{size['rates'][o][0]:.2g}, {size['rates'][o][1]:.2g}"]) for o in OPTIMIZERS]
        rows.append(
            [width, f"{size['active_parameters']:,}", str(size["steps"]), f"{size['pflop_s_days'] * PFLOP_S_DAY:.2g}",
             "yes" if size["is_tuned"] else "by trend", *rates, Spread.of(muon).text(), Spread.of(adamw).text()]
        )  # fmt: skip
    header = ["width", "active parameters", "steps", "FLOP", "tuned", "rates, Muon", "rates, AdamW", "Muon", "AdamW"]
    laws = [
        [name, _interval(law["coefficient"], 3), _interval(law["exponent"], 4), f"{law['r_squared']:.3f}"]
        for name, law in ((LABELS[name], results["laws"][name]) for name in OPTIMIZERS)
    ]
    ratios = [
        [str(one["width"]), number(one["ratio"], 2), f"{number(one['low'], 2)} – {number(one['high'], 2)}"]
        for one in results["compute_ratio"]
    ]
    return "\n\n".join(
        [
            table(header, rows),
            table(["L = c · C^-α, C in PFLOP/s-days", "c (95 %)", "α (95 %)", "R²"], laws),
            table(["at AdamW's loss of width", "Muon's compute / AdamW's", "95 % over the seeds"], ratios),
            "\n".join(findings(results)),
        ]
    )


def _interval(values: Sequence[float], digits: int) -> str:
    value, low, high = (f"{one:.{digits}f}" for one in values)
    return f"{value} ({low} – {high})"


def findings(results: Results) -> list[str]:
    """What was seen, and what was not, a sentence each."""
    ratios, published = results["compute_ratio"], results["published"]
    below = [one for one in ratios if one["high"] < 1]
    smallest, largest = ratios[0], ratios[-1]
    said = [
        f"- {'Seen' if len(below) == len(ratios) else 'Not seen'}: Muon needs less compute than AdamW for the same"
        f" loss, at every size. The 95 % interval is below 1 at {len(below)} of {len(ratios)} sizes.",
        f"- The ratio goes from {smallest['ratio']:.2f} at the smallest size to {largest['ratio']:.2f} at the largest."
        f" Moonlight's printed fits give {published['1.0']:.2f} at 1 PFLOP/s-day and {published['18.0']:.2f} at 18;"
        " these runs are smaller by a factor of 10⁸ and more, and say nothing about those.",
    ]
    for name, label in LABELS.items():
        said += [f"- The law of {label}: {warning}." for warning in results["laws"][name]["warnings"]]
    return said


def draw(results: Results, path: Path) -> None:
    """Losses and laws over compute; beside them the ratio."""
    flop = [size["pflop_s_days"] * PFLOP_S_DAY for size in results["sizes"]]
    with panels(path, 2, width=5.6) as (left, right):
        for name, label, colour in (("muon", "Muon", MUON), ("adamw", "AdamW", ADAMW)):
            law, losses = results["laws"][name], results["val_loss"][name]
            by_size = [list(losses[str(size["width"])].values()) for size in results["sizes"]]
            for c, values in zip(flop, by_size, strict=True):
                left.plot([c] * len(values), values, ".", color=colour, markersize=5, alpha=0.6)
            line = [law["coefficient"][0] * (c / PFLOP_S_DAY) ** -law["exponent"][0] for c in flop]
            left.plot(flop, line, color=colour, linewidth=1.6, label=f"{label}: α = {law['exponent'][0]:.3f}")
        left.set_xscale("log")
        left.set_yscale("log")
        frame(left, "compute, FLOP", "validation loss, nats per byte", "every point a run; lines are the power laws")
        left.legend(frameon=False)
        ratios = results["compute_ratio"]
        x = [one["pflop_s_days"] * PFLOP_S_DAY for one in ratios]
        right.fill_between(x, [r["low"] for r in ratios], [r["high"] for r in ratios], color=MUON, alpha=0.2)
        right.plot(x, [r["ratio"] for r in ratios], "o-", color=MUON)
        right.axhline(1, color="#8a8a8a", linewidth=1)
        right.set_xscale("log")
        right.set_ylim(0, max(1.1, *(r["high"] for r in ratios)))
        frame(right, "AdamW's compute, FLOP", "Muon's / AdamW's, at equal loss", "from the fits; band: 95 % over seeds")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this experiment takes beside the others' options."""
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="multiples of 16")
    parser.add_argument("--tune-up-to", type=int, default=TUNE_UP_TO, help="the largest width that is tuned")


def run(args: Sequence[str] | None = None) -> Results:
    """The command."""
    return main(__doc__, NAME, experiment, tables, draw, args, add_options=add_options)


if __name__ == "__main__":
    run()
