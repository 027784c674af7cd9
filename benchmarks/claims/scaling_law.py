"""Loss against compute over a ladder of sizes, for Muon and AdamW, and the compute at which both reach one loss.

``python -m benchmarks.claims.scaling_law [--json benchmarks/results/scaling_law.json]
[--picture docs/pictures/scaling_law.png] [--widths 32 48 64 80 96]``

Models of one kind that grow with their width, tokens in proportion to the active parameters. Both optimizers are tuned
at the sizes up to ``--tune-up-to`` by the search of `steps_to_loss`, on seeds that are not reported; a larger size
takes the rates where the trend of the tuned ones leads, log-linear in the width. To each optimizer's runs a power law
``L = c · C^-α`` is fitted, as Moonlight does. Compute is counted twice: forward and backward alone, as the paper does,
and with the orthogonalisation of Muon's step, which for so few tokens per step is no small part of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.claims.command import Results, diverged_text, main, tuning_as_json
from benchmarks.claims.compute_ratio import compute_ratios, interpolated_ratio, published_ratio
from benchmarks.claims.description import Run
from benchmarks.claims.figure import ADAMW, MUON, OTHER, THIRD, frame, log_losses, panels
from benchmarks.claims.laboratory import Laboratory, losses_of, without_diverged
from benchmarks.claims.markdown import number, table, verdict
from benchmarks.claims.paired import Spread
from benchmarks.claims.sizes import PFLOP_S_DAY, active_parameters, compute, geometry, num_steps, optimizer_compute
from benchmarks.claims.trend import rates_at
from benchmarks.claims.tuning import Rates, Tuned
from lightning_muon.scaling.law import PowerLaw, fit_power_law

NAME = "scaling_law"
WIDTHS = (32, 48, 64, 80, 96)
TUNE_UP_TO = 64
OPTIMIZERS = ("muon", "adamw")
LABELS = {"muon": "Muon", "adamw": "AdamW"}

Losses = Mapping[int, Mapping[int, float]]  # by width and seed


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
    outcomes, diverged = without_diverged(laboratory.do_arms(arms))
    found = losses_of(outcomes)
    losses = {
        optimizer: {width: found[f"{optimizer}-{width}"] for width in widths if f"{optimizer}-{width}" in found}
        for optimizer in OPTIMIZERS
    }
    first = laboratory.seeds[0]
    runs = {width: arms[f"muon-{width}"][first] for width in widths}
    sizes = {width: compute(run) for width, run in runs.items()}
    of_optimizer = {width: optimizer_compute(run) for width, run in runs.items()}
    both = [width for width in widths if all(width in losses[optimizer] for optimizer in OPTIMIZERS)]
    muon, adamw = ({width: losses[optimizer][width] for width in both} for optimizer in OPTIMIZERS)
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
                "pflop_s_days_of_muon": of_optimizer[width],
                "rates": {optimizer: list(rates[optimizer, width]) for optimizer in OPTIMIZERS},
                "is_tuned": width in tuned,
            }
            for width in widths
        ],
        "diverged": diverged,
        "val_loss": losses,
        "published": {str(c): published_ratio(c) for c in (1.0, 3.0, 10.0, 18.0)},
        **(summarize(sizes, of_optimizer, muon, adamw) if len(both) > 1 else {}),
    }


def _tune(laboratory: Laboratory, width: int) -> dict[str, Tuned]:
    grids = dict.fromkeys(OPTIMIZERS, laboratory.grid)
    return laboratory.search(grids, lambda name, rates, seed: _run_of(laboratory, name, width, rates, seed))


def _run_of(laboratory: Laboratory, optimizer: str, width: int, rates: Rates, seed: int) -> Run:
    setting = laboratory.setting
    return setting.run(optimizer, rates, seed, num_steps(width, setting.steps), model=geometry(width))


def summarize(sizes: Mapping[int, float], of_optimizer: Mapping[int, float], muon: Losses, adamw: Losses) -> Results:
    """The two laws, and Muon's compute over AdamW's at equal loss, without and with that of Muon's step.

    Args:
        sizes: The model's compute by width, in PFLOP/s-days.
        of_optimizer: That of Muon's step, beside it.
        muon: Losses by width and seed, of two widths or more.
        adamw: The same.
    """
    with_optimizer = {width: sizes[width] + of_optimizer[width] for width in sizes}
    laws = {
        "muon": fit(sizes, muon),
        "muon_with_optimizer": fit(with_optimizer, muon),
        "adamw": fit(sizes, adamw),
    }
    return {
        "laws": {name: _law(law) for name, law in laws.items()},
        "compute_ratio": _ratios(sizes, compute_ratios(sizes, sizes, muon, adamw)),
        "compute_ratio_with_optimizer": _ratios(sizes, compute_ratios(with_optimizer, sizes, muon, adamw)),
    }


def _ratios(sizes: Mapping[int, float], ratios: Mapping[int, Mapping[str, float]]) -> list[Results]:
    return [{"width": width, "pflop_s_days": sizes[width], **ratio} for width, ratio in ratios.items()]


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
        losses = [_losses_text(results["val_loss"][name].get(width)) for name in OPTIMIZERS]
        rates = [f"{size['rates'][o][0]:.2g}, {size['rates'][o][1]:.2g}" for o in OPTIMIZERS]
        rows.append(
            [width, f"{size['active_parameters']:,}", str(size["steps"]), f"{size['pflop_s_days'] * PFLOP_S_DAY:.2g}",
             f"{size['pflop_s_days_of_muon'] / size['pflop_s_days']:.2f}", "yes" if size["is_tuned"] else "by trend",
             *rates, *losses]
        )  # fmt: skip
    header = ["width", "active parameters", "steps", "FLOP", "Muon's step beside it", "tuned", "rates, Muon",
              "rates, AdamW", "Muon", "AdamW"]  # fmt: skip
    parts = [table(header, rows)]
    if "laws" in results:
        laws = [
            [_LAWS[name], _interval(law["coefficient"], 3), _interval(law["exponent"], 4), f"{law['r_squared']:.3f}"]
            for name, law in results["laws"].items()
        ]
        between = [interpolated(results, key) for key in _RATIOS]
        ratios = [
            [
                str(one["width"]),
                *_ratio_text(one),
                number(between[0][n], 2),
                *_ratio_text(whole),
                number(between[1][n], 2),
            ]
            for n, (one, whole) in enumerate(zip(*(results[key] for key in _RATIOS), strict=True))
        ]
        interval = "95 %, bootstrap over seeds"
        parts += [
            table(["L = c · C^-α, C in PFLOP/s-days", "c (95 %)", "α (95 %)", "R²"], laws),
            table(["at AdamW's loss of width", "Muon's compute / AdamW's, of the model, by the laws", interval,
                   "between Muon's runs", "with the optimizer's, by the laws", interval, "between Muon's runs"],
                  ratios),
        ]  # fmt: skip
    return "\n\n".join([*parts, "\n".join(findings(results))])


_LAWS = {"muon": "Muon", "muon_with_optimizer": "Muon, with the optimizer's compute", "adamw": "AdamW"}
_RATIOS = {
    "compute_ratio": "by the model's compute, as the paper counts",
    "compute_ratio_with_optimizer": "with the compute of Muon's step",
}


def interpolated(results: Results, key: str) -> list[float | None]:
    """The ratios without a law, at the widths of ``results[key]``."""
    adds_step = key == "compute_ratio_with_optimizer"
    model = {str(size["width"]): size["pflop_s_days"] for size in results["sizes"]}
    of_muon = {
        str(size["width"]): size["pflop_s_days"] + adds_step * size["pflop_s_days_of_muon"] for size in results["sizes"]
    }
    muon, adamw = (
        {width: fmean(by_seed.values()) for width, by_seed in results["val_loss"][name].items()} for name in OPTIMIZERS
    )
    losses = {of_muon[width]: loss for width, loss in muon.items()}
    widths = [str(one["width"]) for one in results[key]]
    return [interpolated_ratio(model[width], adamw[width], losses) for width in widths]


def _range(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{min(known):.2f} to {max(known):.2f}" if known else "not to be had"


def _losses_text(by_seed: Mapping[str, float] | None) -> str:
    return "diverged" if by_seed is None else Spread.of(list(by_seed.values())).text()


def _interval(values: Sequence[float], digits: int) -> str:
    value, low, high = (f"{one:.{digits}f}" for one in values)
    return f"{value} ({low} – {high})"


def _ratio_text(one: Mapping[str, float]) -> list[str]:
    return [number(one["ratio"], 2), f"{number(one['low'], 2)} – {number(one['high'], 2)}"]


def findings(results: Results) -> list[str]:
    """What was seen, and what was not, a sentence each."""
    said, sizes, published = diverged_text(results), results["sizes"], results["published"]
    if "laws" not in results:
        return [
            *said,
            f"- {verdict(False)}: Muon needs less compute than AdamW for the same loss. Too few sizes are left.",
        ]
    tuned = sum(size["is_tuned"] for size in sizes)
    for key, how in _RATIOS.items():
        ratios = results[key]
        below = sum(one["high"] < 1 for one in ratios)
        said.append(
            f"- {verdict(below == len(sizes))}, {how}: Muon needs less compute than AdamW for the same loss, at every"
            f" size. By the laws the ratio is {_range(one['ratio'] for one in ratios)}, its interval below 1 at {below}"
            f" of {len(sizes)} sizes; between Muon's own runs it is {_range(interpolated(results, key))}. {tuned} of"
            " all were tuned, and the others have rates by trend."
        )
    said.append(
        f"- Moonlight's printed fits give {published['1.0']:.2f} at 1 PFLOP/s-day and {published['18.0']:.2f} at 18."
        f" The largest of these runs is smaller than 1 PFLOP/s-day by a factor of"
        f" {1 / max(size['pflop_s_days'] for size in sizes):.2g}, and says nothing about those."
    )
    for name, label in _LAWS.items():
        said += [f"- The law of {label}: {warning}." for warning in results["laws"][name]["warnings"]]
    return said


def draw(results: Results, path: Path) -> None:
    """Losses and laws over the model's compute; beside them the two ratios. Nothing if too few sizes have a loss."""
    if "laws" not in results:
        return
    flop = [size["pflop_s_days"] * PFLOP_S_DAY for size in results["sizes"]]
    with panels(path, 2, width=5.6) as (left, right):
        for name, label, colour in (("muon", "Muon", MUON), ("adamw", "AdamW", ADAMW)):
            for size, c in zip(results["sizes"], flop, strict=True):
                values = list(results["val_loss"][name].get(str(size["width"]), {}).values())
                left.plot([c] * len(values), values, ".", color=colour, markersize=5, alpha=0.6)
            law = results["laws"][name]
            line = [law["coefficient"][0] * (c / PFLOP_S_DAY) ** -law["exponent"][0] for c in flop]
            left.plot(flop, line, color=colour, linewidth=1.6, label=f"{label}: α = {law['exponent'][0]:.3f}")
        left.set_xscale("log")
        log_losses(left)
        frame(
            left, "the model's compute, FLOP", "validation loss, nats per byte", "every point a run; lines are the laws"
        )
        left.legend(frameon=False)
        for (key, label), colour in zip(_RATIOS.items(), (MUON, THIRD), strict=True):
            ratios = results[key]
            x = [one["pflop_s_days"] * PFLOP_S_DAY for one in ratios]
            right.fill_between(x, [r["low"] for r in ratios], [r["high"] for r in ratios], color=colour, alpha=0.2)
            right.plot(x, [r["ratio"] for r in ratios], "o-", color=colour, label=label)
        right.axhline(1, color=OTHER, linewidth=1)
        right.set_xscale("log")
        right.set_ylim(bottom=0)
        right.legend(frameon=False, fontsize=8)
        title = "from the laws; bands: 95 %, bootstrap over seeds"
        frame(right, "AdamW's compute, FLOP", "Muon's / AdamW's, at equal loss", title)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this experiment takes beside the others' options."""
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="multiples of 16")
    parser.add_argument("--tune-up-to", type=int, default=TUNE_UP_TO, help="the largest width that is tuned")


def run(args: Sequence[str] | None = None) -> Results:
    """The command."""
    return main(__doc__, NAME, experiment, tables, draw, args, add_options=add_options)


if __name__ == "__main__":
    run()
