"""What the experiments' commands share: their options, and what is written."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.claims.laboratory import Laboratory
from benchmarks.claims.markdown import listed
from benchmarks.claims.pool import default_slots
from benchmarks.claims.run import Outcome
from benchmarks.claims.setting import GRIDS, MODEL, SEEDS, STEPS, TUNING_SEEDS, Setting
from benchmarks.claims.tuning import Tuned
from examples.moe_lm.environment import environment
from lightning_muon.checkpoint.atomic import replacing

Results = dict[str, Any]
"""What an experiment's JSON holds. Keys are strings, seeds too."""


def diverged_text(results: Results) -> list[str]:
    """What is said of arms that `without_diverged` has left out; no claim that needs one of them is called seen."""
    return [
        f"- {arm}: training diverged with seed {listed([str(seed) for seed in seeds])}; left out."
        for arm, seeds in results["diverged"].items()
    ]


def tuning_as_json(tuned: Mapping[str, Tuned]) -> Results:
    """The searches, point by point, by seed; a diverged run has no loss."""
    return {
        name: {
            "lr": one.best.lr,
            "adamw_lr": one.best.adamw_lr,
            "initializer_range": one.best.initializer_range,
            "is_on_edge": one.is_on_edge,
            "tried": [
                {
                    **rates._asdict(),
                    "val_loss": {seed: loss if math.isfinite(loss) else None for seed, loss in by_seed.items()},
                }
                for rates, by_seed in one.losses.items()
            ],
        }
        for name, one in tuned.items()
    }


def main(
    documentation: str | None,
    name: str,
    experiment: Callable[[Laboratory], Results],
    table: Callable[[Results], str],
    draw: Callable[[Results, Path], None],
    args: Sequence[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> Results:
    """An experiment's command.

    Args:
        documentation: What ``--help`` says.
        name: The experiment's.
        experiment: Does the runs, and returns what goes into the JSON.
        table: Says the results in Markdown.
        draw: Makes the picture.
        args: The command line.
        seeds: Those that are reported if the command line names none.
        add_options: Adds options of the experiment's own, which it finds in ``laboratory.options``.

    Returns:
        What was, or would be, written.
    """
    options = _parse(documentation, args, seeds, add_options)
    files = None if options.files is None else tuple(options.files)
    setting = Setting(options.steps, files, options.val_windows, options.batch_size)
    slots = options.devices or default_slots()
    kind = slots[0].split(":")[0]
    laboratory = Laboratory(
        setting,
        options.seeds,
        options.tuning_seeds,
        GRIDS[options.grid],
        options.max_growths,
        options.folder / kind,
        slots,
        options,
    )
    found = experiment(laboratory)
    described = {
        "experiment": name,
        **environment(),
        "steps": setting.steps,
        "tokens_per_step": setting.tokens_per_step,
        "seeds": list(options.seeds),
        "tuning_seeds": list(options.tuning_seeds),
        **found,
        **_of_all(list(laboratory.outcomes.values())),
    }
    results: Results = json.loads(json.dumps(described))  # as whoever reads the file will have it
    print("\n" + table(results))
    if options.json is not None:
        with replacing(options.json) as staged:
            staged.write_text(json.dumps(results, indent=1) + "\n")
    if options.picture is not None:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(results, options.picture)
    return results


def _parse(
    documentation: str | None,
    args: Sequence[str] | None,
    seeds: Sequence[int],
    add_options: Callable[[argparse.ArgumentParser], None],
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="of a run at full length")
    parser.add_argument("--batch-size", type=int, default=Setting.batch_size, help="windows of 64 tokens per step")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--tuning-seeds", type=int, nargs="+", default=list(TUNING_SEEDS), help="never reported")
    parser.add_argument("--grid", choices=tuple(GRIDS), default="full", help="where the search for rates begins")
    parser.add_argument("--max-growths", type=int, default=None, help="end the search after so many, edge or not")
    parser.add_argument("--devices", nargs="+", default=None, help="one for each process, 'cpu' or 'cuda:0'")
    parser.add_argument("--folder", type=Path, default=Path("runs/claims"), help="finished runs are not repeated")
    parser.add_argument("--files", nargs="+", default=None, help="the text; by default the standard library")
    parser.add_argument("--val-windows", type=int, default=256, help="windows of validation text")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--picture", type=Path, default=None)
    add_options(parser)
    options = parser.parse_args(args)
    if taken := sorted(set(options.tuning_seeds) & set(options.seeds)):
        seeds_text = listed([str(seed) for seed in taken])
        parser.error(f"--seeds: rates are tuned on {seeds_text}, which cannot be reported; name others")
    for name, named in (("--seeds", options.seeds), ("--tuning-seeds", options.tuning_seeds)):
        if len(set(named)) < len(named):
            parser.error(f"{name}: {named} names a seed twice; a seed counts once")
    return options


def _of_all(outcomes: Sequence[Outcome]) -> Results:
    """What every experiment says of its runs.

    Raises:
        ValueError: They did not all read the same text, so that nothing is paired.
    """
    texts = {(outcome.run.start_from is None, outcome.figures["text_sha256"]) for outcome in outcomes}
    if len(texts) > len({is_text for is_text, _ in texts}):  # text is one thing, conversations are another
        raise ValueError(
            f"the runs read {len(texts)} different texts ({', '.join(sorted(one for _, one in texts))}): Python was"
            " replaced in between? Remove the older ones' folders and start again."
        )
    environments = [outcome.figures["environment"] for outcome in outcomes]
    return {
        "text_sha256": next((one for is_text, one in texts if is_text), None),
        "conversations_sha256": next((one for is_text, one in texts if not is_text), None),
        "devices_of_runs": sorted({one["device"] for one in environments}),
        "commits_of_runs": sorted({str(one["commit"]) for one in environments}),
        "seconds_of_runs": round(sum(outcome.figures["seconds"] for outcome in outcomes)),
        "model": dict(MODEL),
        "runs": [_of_one(outcome) for outcome in outcomes],
    }


def _of_one(outcome: Outcome) -> Results:
    """A run by what is not the default, and what came out."""
    run = outcome.run
    usual = {one.name: one.default for one in fields(run)} | {"model": dict(MODEL)}
    described = {name: value for name, value in json.loads(run.to_json()).items() if getattr(run, name) != usual[name]}
    figures = ("val_loss", "train_loss", "diverged", "seconds")
    return {"key": run.key, **described, **{name: outcome.figures[name] for name in figures}}
