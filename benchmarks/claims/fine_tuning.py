"""Which optimizer to fine-tune with, by the one that the checkpoint was trained with: Moonlight's Table 6, in small.

``python -m benchmarks.claims.fine_tuning [--json benchmarks/results/fine_tuning.json]
[--picture docs/pictures/fine_tuning.png]``

Checkpoints of Muon and of AdamW, trained on windows that are long enough for whole functions, are fine-tuned with
either optimizer: a function of the standard library is asked for, its docstring is the answer, and only the answer
counts. They are trained at the learning rates that were tuned, at the usual initial scale, on the shorter windows of
the other experiments and for half as many steps. Each of the four pairs has its own two learning rates, tuned by the
same search on a seed that is not reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.claims.command import Results, diverged_text, main, tuning_as_json
from benchmarks.claims.description import Run
from benchmarks.claims.figure import ADAMW, MUON, frame, panels
from benchmarks.claims.laboratory import SEARCHES_AT_USUAL_SCALE, Laboratory, losses_of, without_diverged
from benchmarks.claims.markdown import number, p_value, table, verdict
from benchmarks.claims.paired import Spread, paired
from benchmarks.claims.run import Outcome
from benchmarks.claims.setting import MODEL
from benchmarks.claims.tuning import Grid, Rates, Tuned

NAME = "fine_tuning"
OPTIMIZERS = ("muon", "adamw")
SEQ_LEN = 256
PAIRS = tuple(f"{trained}/{optimizer}" for trained in OPTIMIZERS for optimizer in OPTIMIZERS)
GRIDS = {
    "full": Grid((1e-3, 2e-3, 4e-3), (1e-3, 2e-3, 4e-3)),
    "inner": Grid((2e-3, 4e-3), (2e-3, 4e-3, 8e-3)),
    "tiny": Grid((1e-3, 2e-3), (2e-3,)),
}
BEST = "muon/muon"  # by the claim
_LABELS = {"muon": "Muon", "adamw": "AdamW"}


def experiment(laboratory: Laboratory) -> Results:
    """Trains the checkpoints, tunes the four pairs, and does the runs that are reported."""
    rates = laboratory.tune(SEARCHES_AT_USUAL_SCALE)
    tuning_seed = laboratory.tuning_seeds[0]  # only one: each has two checkpoints to be trained first
    seeds = [tuning_seed, *laboratory.seeds]
    checkpoints, diverged = without_diverged(
        laboratory.do_arms(
            {
                name: {seed: _pretraining(laboratory, name, rates[name].best, seed) for seed in seeds}
                for name in OPTIMIZERS
            }
        )
    )
    tuned = _tune(laboratory, checkpoints, tuning_seed)
    arms = {
        pair: {seed: _fine_tuning(laboratory, pair, found.best, checkpoints, seed) for seed in laboratory.seeds}
        for pair, found in tuned.items()
    }
    done, diverged_pairs = without_diverged(laboratory.do_arms(arms))
    losses = losses_of(done)
    return {
        "tuning": tuning_as_json(rates),
        "fine_tuning_rates": tuning_as_json(tuned),
        "diverged": {
            **{f"checkpoint of {_LABELS[name]}": found for name, found in diverged.items()},
            **{_pair_text(pair): found for pair, found in diverged_pairs.items()},
        },
        "pretrained": {
            name: {seed: outcome.val_loss for seed, outcome in by_seed.items() if seed != tuning_seed}
            for name, by_seed in checkpoints.items()
        },
        "val_loss": losses,
        "val_loss_before": {pair: _figure(by_seed, "val_loss_before") for pair, by_seed in done.items()},
        "text_loss": {pair: _figure(by_seed, "text_loss") for pair, by_seed in done.items()},
        "text_loss_before": {pair: _figure(by_seed, "text_loss_before") for pair, by_seed in done.items()},
        "muon_against_adamw": {
            trained: paired(losses[f"{trained}/muon"], losses[f"{trained}/adamw"]).asdict()
            for trained in OPTIMIZERS
            if {f"{trained}/muon", f"{trained}/adamw"} <= losses.keys()
        },
        "best_against": {
            pair: paired(losses[BEST], losses[pair]).asdict() for pair in losses if BEST in losses and pair != BEST
        },
    }


def _figure(by_seed: Mapping[int, Outcome], name: str) -> dict[int, float]:
    return {seed: outcome.figures[name] for seed, outcome in by_seed.items()}


def _pretraining(laboratory: Laboratory, optimizer: str, rates: Rates, seed: int) -> Run:
    setting = laboratory.setting
    model = {**MODEL, "max_seq_len": SEQ_LEN}
    return setting.run(
        optimizer, rates, seed, 2 * setting.steps, model=model, seq_len=SEQ_LEN, batch_size=4, keep_checkpoint=True
    )


def _fine_tuning(
    laboratory: Laboratory, pair: str, rates: Rates, checkpoints: Mapping[str, Mapping[int, Outcome]], seed: int
) -> Run:
    trained, optimizer = pair.split("/")
    setting = laboratory.setting
    return setting.run(
        optimizer,
        rates,
        seed,
        max(2, setting.steps // 4),
        model={**MODEL, "max_seq_len": SEQ_LEN},
        seq_len=SEQ_LEN,
        batch_size=16,
        start_from=str(checkpoints[trained][seed].checkpoint),
    )


def _tune(
    laboratory: Laboratory, checkpoints: Mapping[str, Mapping[int, Outcome]], tuning_seed: int
) -> dict[str, Tuned]:
    grids = {pair: GRIDS[laboratory.options.grid] for pair in PAIRS if pair.split("/")[0] in checkpoints}

    def run_of(pair: str, rates: Rates, seed: int) -> Run:
        return _fine_tuning(laboratory, pair, rates, checkpoints, seed)

    return laboratory.search(grids, run_of, [tuning_seed])


def tables(results: Results) -> str:
    """The results in Markdown."""
    rows = []
    for pair, losses in results["val_loss"].items():
        trained, optimizer = (_LABELS[name] for name in pair.split("/"))
        spread = {
            name: Spread.of(list(results[name][pair].values())).text()
            for name in ("val_loss_before", "text_loss_before", "text_loss")
        }
        tuned = results["fine_tuning_rates"][pair]
        rate = f"{tuned['lr']:g}, {tuned['adamw_lr']:g}"
        rows.append(
            [trained, optimizer, rate, spread["val_loss_before"], Spread.of(list(losses.values())).text(),
             spread["text_loss_before"], spread["text_loss"]]
        )  # fmt: skip
    header = ["trained with", "fine-tuned with", "rates", "answers before", "answers", "text before", "text"]
    compared = [
        [_LABELS[trained], number(one["mean"], sign=True), f"{one['seeds_below']} of {len(one['differences'])}",
         p_value(one["p_below"])]
        for trained, one in results["muon_against_adamw"].items()
    ]  # fmt: skip
    differences = table(["checkpoint of", "fine-tuned with Muon, minus with AdamW", "seeds below", "p"], compared)
    return "\n\n".join([table(header, rows), differences, "\n".join(findings(results))])


def findings(results: Results) -> list[str]:
    """What was seen of the claims, and what was not, a sentence each."""
    seeds, said = len(results["seeds"]), diverged_text(results)
    against, compared = results["best_against"], results["muon_against_adamw"]
    means = {pair: sum(by_seed.values()) / seeds for pair, by_seed in results["val_loss"].items()}
    if means:
        is_best = len(against) == len(PAIRS) - 1 and all(one["seeds_below"] == seeds for one in against.values())
        each = "; ".join(f"{_pair_text(pair)} in {one['seeds_below']}" for pair, one in against.items())
        said.append(
            f"- {verdict(is_best)}: Muon on Muon's checkpoint is better than each other pair, in every seed. The best"
            f" mean is that of {_pair_text(min(means, key=lambda pair: means[pair]))}."
            + (f" Of {seeds} seeds it is below {each}." if each else "")
        )
    if (on_muon := compared.get("muon")) is not None:
        said.append(
            f"- {verdict(on_muon['seeds_below'] == seeds)}: Muon is better than AdamW on Muon's checkpoint, in every"
            f" seed. The mean difference is {number(on_muon['mean'], sign=True)}, below zero in"
            f" {on_muon['seeds_below']} of {seeds} seeds."
        )
    if (on_adamw := compared.get("adamw")) is not None:
        said.append(
            f"- {verdict(on_adamw['seeds_above'] == seeds)}: on AdamW's checkpoint Muon is worse than AdamW, in every"
            f" seed. The mean difference is {number(on_adamw['mean'], sign=True)}, above zero in"
            f" {on_adamw['seeds_above']} of {seeds} seeds."
        )
    said += _forgetting(results)
    edges = [_pair_text(pair) for pair, one in results["fine_tuning_rates"].items() if one["is_on_edge"]]
    return [*said, f"- The search ended on the edge for {'; '.join(edges)}."] if edges else said


def _forgetting(results: Results) -> list[str]:
    """What plain text costs afterwards, by Muon against AdamW. The papers say nothing on it, so there is no verdict."""
    said, text = [], results["text_loss"]
    for trained in OPTIMIZERS:
        if not {f"{trained}/muon", f"{trained}/adamw"} <= text.keys():
            continue
        more = paired(text[f"{trained}/muon"], text[f"{trained}/adamw"])
        said.append(
            f"- Plain text afterwards, on {_LABELS[trained]}'s checkpoint: Muon's loss minus AdamW's is"
            f" {number(more.mean, sign=True)}, above in {more.seeds_above} of {len(more.differences)} seeds."
        )
    return said


def _pair_text(pair: str) -> str:
    trained, optimizer = (_LABELS[name] for name in pair.split("/"))
    return f"{optimizer} on {trained}'s checkpoint"


def draw(results: Results, path: Path) -> None:
    """What the answers cost after fine-tuning, and what plain text costs then."""
    with panels(path, 2, width=4.6) as axes:
        for panel, (key, label) in zip(axes, _PANELS, strict=True):
            for x, trained in enumerate(OPTIMIZERS):
                for shift, (optimizer, colour) in zip((-0.12, 0.12), (("muon", MUON), ("adamw", ADAMW)), strict=True):
                    values: list[float] = list(results[key].get(f"{trained}/{optimizer}", {}).values())
                    if not values:
                        continue
                    panel.plot([x + shift] * len(values), values, ".", color=colour, alpha=0.5)
                    panel.plot([x + shift], [sum(values) / len(values)], "o", color=colour)
            frame(panel, "checkpoint of", label)
            panel.set_xticks(range(len(OPTIMIZERS)), [_LABELS[name] for name in OPTIMIZERS])
            panel.set_xlim(-0.5, len(OPTIMIZERS) - 0.5)
        for optimizer, colour in (("muon", MUON), ("adamw", ADAMW)):
            axes[0].plot([], [], "o", color=colour, label=f"fine-tuned with {_LABELS[optimizer]}")
        axes[0].legend(frameon=False)


_PANELS = (("val_loss", "answers, nats per token"), ("text_loss", "plain text afterwards, nats per byte"))


def run(args: Sequence[str] | None = None) -> Results:
    """The command."""
    return main(__doc__, NAME, experiment, tables, draw, args)


if __name__ == "__main__":
    run()
