"""Validation loss against tokens, of runs tuned as in `steps_to_loss`: AdamW and Muon over all the steps, and Muon over
the share of them that is claimed.

``python -m benchmarks.claims.loss_curves --steps 1200 --grid inner [--json benchmarks/results/loss_curves.json]
[--picture docs/pictures/loss_curves.png]``

A picture, and no claim: within a run the schedule is not at its end, and a loss there is not what a run of that length
would have reached. What is claimed is judged by `steps_to_loss`, at the end of each run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.claims.command import Results, diverged_text, main, tuning_as_json
from benchmarks.claims.figure import ADAMW, MUON, THIRD, frame, log_losses, panels
from benchmarks.claims.laboratory import Laboratory, without_diverged
from benchmarks.claims.markdown import table
from benchmarks.claims.paired import Spread
from benchmarks.claims.run import Outcome
from benchmarks.claims.setting import interval
from benchmarks.claims.steps_to_loss import CLAIMED_SHARE, SEARCHES

NAME = "loss_curves"
Curve = Sequence[tuple[int, float]]
POINTS = 20
"""How often a run at full length is validated, at least."""

_LABELS = {"adamw": "AdamW", "muon": "Muon", "muon_short": f"Muon, {100 * CLAIMED_SHARE:.0f} % of the steps"}
_COLOURS = {"adamw": ADAMW, "muon": MUON, "muon_short": THIRD}


def experiment(laboratory: Laboratory) -> Results:
    """Tunes as `steps_to_loss` does, and follows the runs."""
    setting = laboratory.setting
    searches = {name: SEARCHES[name] for name in _LABELS}
    tuned = laboratory.tune(searches)
    steps = {name: round(search.share * setting.steps) for name, search in searches.items()}
    common = math.gcd(*steps.values())
    every = interval(common, max(1, POINTS * common // setting.steps))
    arms = {
        name: {
            seed: setting.run(
                search.optimizer, tuned[name].best, seed, steps[name], measure=("loss",), measure_every=every
            )
            for seed in laboratory.seeds
        }
        for name, search in searches.items()
    }
    outcomes, diverged = without_diverged(laboratory.do_arms(arms))
    return {
        "tuning": tuning_as_json(tuned),
        "diverged": diverged,
        "curves": {
            arm: {seed: _curve(outcome) for seed, outcome in by_seed.items()} for arm, by_seed in outcomes.items()
        },
    }


def _curve(outcome: Outcome) -> list[tuple[int, float]]:
    """Tokens seen, and the loss then."""
    tokens = outcome.run.batch_size * outcome.run.seq_len
    return [(step * tokens, loss) for step, loss in outcome.curve("val/loss")]


def tables(results: Results) -> str:
    """The results in Markdown: each fourth point, and the last one."""
    spreads = {arm: _spreads(by_seed) for arm, by_seed in results["curves"].items()}
    points = sorted({tokens for by_tokens in spreads.values() for tokens in by_tokens})
    rows = [
        [f"{tokens:,}", *(by_tokens[tokens].text() if tokens in by_tokens else "" for by_tokens in spreads.values())]
        for tokens in points[::-1][::4][::-1]
    ]
    return "\n\n".join([table(["tokens", *(_LABELS[arm] for arm in spreads)], rows), *findings(results)])


def _spreads(by_seed: Mapping[str, Curve]) -> dict[int, Spread]:
    return {points[0][0]: Spread.of([loss for _, loss in points]) for points in zip(*by_seed.values(), strict=True)}


def findings(results: Results) -> list[str]:
    """What diverged. Nothing is claimed here."""
    return diverged_text(results)


def draw(results: Results, path: Path) -> None:
    """The mean of the seeds as a line, from the lowest to the highest as a band."""
    with panels(path, 1, width=7) as (axes,):
        for arm, by_seed in results["curves"].items():
            curves = list(by_seed.values())
            tokens = [tokens / 1e6 for tokens, _ in curves[0]]
            losses = [[loss for _, loss in points] for points in zip(*curves, strict=True)]
            axes.fill_between(tokens, list(map(min, losses)), list(map(max, losses)), color=_COLOURS[arm], alpha=0.2)
            axes.plot(tokens, list(map(fmean, losses)), color=_COLOURS[arm], linewidth=1.8, label=_LABELS[arm])
        title = f"mean of the seeds ({len(results['seeds'])}); bands from the lowest to the highest"
        frame(axes, "million tokens", "validation loss, nats per byte", title)
        log_losses(axes)
        axes.legend(frameon=False)


if __name__ == "__main__":
    main(__doc__, NAME, experiment, tables, draw)
