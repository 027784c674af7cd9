"""A laboratory that trains nothing: it keeps what was asked for, and returns losses that are made up."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.claims.description import Run
from benchmarks.claims.laboratory import Laboratory
from benchmarks.claims.run import Outcome
from benchmarks.claims.setting import GRIDS, TUNING_SEEDS, Setting
from benchmarks.claims.tuning import USUAL_INIT

SEEDS = (1, 2, 3)
WIDE_INIT = 0.125
# The best rates of the matrices, by optimizer and initial scale: inside the full grid, and better at the wider scale
BEST_LR = {
    ("muon", WIDE_INIT): 8e-3,
    ("muon", USUAL_INIT): 4e-3,
    ("adamw", WIDE_INIT): 4e-3,
    ("adamw", USUAL_INIT): 8e-3,
}
BEST_ADAMW_LR = 1.6e-2
NAMES = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.experts.up_proj.0",
)


def loss(run: Run) -> float:
    """A valley over both rates, deeper at the wider scale and for longer runs; shallower with the seed."""
    scale = run.model["initializer_range"]
    away = abs(math.log2(run.lr / BEST_LR[run.optimizer, scale]))
    if run.adamw_lr is not None:
        away += abs(math.log2(run.adamw_lr / BEST_ADAMW_LR))
    return 2 + 0.1 * away - 0.05 * (scale == WIDE_INIT) - 1e-5 * run.steps + 0.001 * run.seed


class Recorded(Laboratory):
    """Attributes:
    asked: Every run that was asked for, in order.
    """

    def __init__(
        self, loss_of: Callable[[Run], float] = loss, grid: str = "full", steps: int = 600, **options: Any
    ) -> None:
        described = argparse.Namespace(grid=grid, **options)
        super().__init__(Setting(steps), SEEDS, TUNING_SEEDS, GRIDS[grid], None, Path("nowhere"), ["cpu"], described)
        self.loss_of = loss_of
        self.asked: list[Run] = []

    def do(self, runs: Iterable[Run]) -> list[Outcome]:
        """What each would have measured; an infinite loss is a run that diverged, of which nothing was."""
        found = []
        for run in runs:
            self.asked.append(run)
            value = self.loss_of(run)
            diverged = math.isinf(value)
            figures: dict[str, Any] = {
                "measured": {} if diverged else _measured(run),
                "diverged": "it" if diverged else None,
            }
            for name in ("val_loss", "train_loss", "val_loss_before", "text_loss", "text_loss_before"):
                figures[name] = None if diverged else value
            self.outcomes[run.key] = Outcome(run, figures, self.folder / run.key)
            found.append(self.outcomes[run.key])
        return found

    @property
    def tuning(self) -> list[Run]:
        """Those of the search."""
        return [run for run in self.asked if run.seed in TUNING_SEEDS]

    @property
    def reported(self) -> list[Run]:
        """The others."""
        return [run for run in self.asked if run.seed not in TUNING_SEEDS]


def _measured(run: Run) -> dict[str, list[tuple[int, float]]]:
    steps = range(run.interval, run.steps + 1, run.interval)
    families = {"updates": "update_rms", "weights": "weight_rms", "spectra": "weight_svd_entropy"}
    keys = [f"muon/{families[one]}/{name}" for one in run.measure if one in families for name in NAMES]
    if "loss" in run.measure:
        keys.append("val/loss")
    if run.watch_logits or run.clip_tau is not None:
        keys += ["attention/max_logit/_max", "attention/max_logit/a.0"]
    if run.clip_tau is not None:
        keys += ["attention/clipped_heads/a"]
    return {key: [(step, 0.2 + 0.001 * run.seed) for step in steps] for key in keys}
