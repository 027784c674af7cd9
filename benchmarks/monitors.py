"""What the monitors cost a training step of the example, and at their default cadence.

``python -m benchmarks.monitors [--rounds 60] [--json benchmarks/results/monitors.json]``

One real Trainer run on one process, TensorBoard included. Every other step takes its turn: one without any monitor, one
that only takes the update RMS, one that takes all that ``UpdateRMSMonitor`` logs, one each with one, two, three and
four monitors. A monitor that measures every n-th step costs the n-th part of what it adds to a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

import lightning_muon as lm
from benchmarks.timing import report
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.data import TextDataModule
from examples.moe_lm.demo import BATCH_SIZE, LEARNING_RATES, SEQ_LEN
from examples.moe_lm.model import MoELM
from lightning_muon.monitoring import Collection
from lightning_muon.pytorch.callbacks.base import Monitor

NOTHING, RMS, COLLECT, UPDATES = "no monitor", "update RMS, not logged", "UpdateRMS, not logged", "UpdateRMS"
NORMS, SPECTRA, ALL = "and WeightNorm", "and Spectrum", "and MomentumSpectrum"
TURNS = (NOTHING, RMS, COLLECT, UPDATES, NORMS, SPECTRA, ALL)
LOG_EVERY, SPECTRA_EVERY = 50, 200  # the Trainer's default log_every_n_steps, and that of the spectra


def turn_of(step: int) -> str | None:
    """Whose turn the step is, counted from 1. Every other one is nobody's: TensorBoard's thread finishes writing."""
    return TURNS[step // 2 % len(TURNS)] if step % 2 else None


class _InTurns:
    """Makes a monitor due in its own turn and in all later ones.

    Attributes:
        first: Its own turn.
    """

    first: ClassVar[str]

    def is_due(self, trainer: L.Trainer, step: int) -> bool:
        """Steps count from 1."""
        turn = turn_of(step)
        return turn is not None and TURNS.index(turn) >= TURNS.index(self.first)


class UpdateRMSMonitor(_InTurns, lm.UpdateRMSMonitor):
    """Serves the others, as the first of them; what it finds in the turn that only collects is not logged."""

    first = COLLECT

    @override
    def _log(self, trainer: L.Trainer, due: Sequence[Monitor], collection: Collection) -> None:
        if turn_of(trainer.global_step) not in (RMS, COLLECT):
            super()._log(trainer, due, collection)


class UpdateRMSAlone(Monitor):
    """The one figure that the step itself leaves behind."""

    families = ("update_rms",)

    @override
    def is_due(self, trainer: L.Trainer, step: int) -> bool:
        return turn_of(step) == RMS


class WeightNormMonitor(_InTurns, lm.WeightNormMonitor):
    """In turns."""

    first = NORMS


class SpectrumMonitor(_InTurns, lm.SpectrumMonitor):
    """In turns."""

    first = SPECTRA


class MomentumSpectrumMonitor(_InTurns, lm.MomentumSpectrumMonitor):
    """In turns."""

    first = ALL


class StepTimes(Callback):
    """Seconds from the start of each batch to that of the next, by turn; the first rounds are not counted."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.start = warmup, 0.0
        self.seconds: dict[str, list[float]] = {turn: [] for turn in TURNS}

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        turn = turn_of(trainer.global_step)
        if turn is not None and trainer.global_step > 2 * self.warmup * len(TURNS):
            self.seconds[turn].append(now - self.start)
        self.start = now


def main() -> None:
    """Train, print the table and the overheads, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    warmup = 5
    times = StepTimes(warmup)
    monitors: list[Monitor] = [UpdateRMSMonitor(), UpdateRMSAlone(), WeightNormMonitor(), SpectrumMonitor()]
    monitors.append(MomentumSpectrumMonitor())
    lr, adamw_lr = LEARNING_RATES["muon"]
    L.seed_everything(1, verbose=False)
    with TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=2 * (warmup + options.rounds) * len(TURNS) + 1,
            logger=TensorBoardLogger(folder, name="", version=""),
            callbacks=[times, *monitors],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            log_every_n_steps=LOG_EVERY,
        )
        model = MoELM(ModelConfig(max_seq_len=SEQ_LEN), lr=lr, adamw_lr=adamw_lr)
        trainer.fit(model, TextDataModule(seq_len=SEQ_LEN, batch_size=BATCH_SIZE))
    plain = statistics.median(times.seconds[NOTHING])
    # rounds are compared one by one, so that what slows the machine for a while slows both
    extra = {
        turn: statistics.median([a - b for a, b in zip(seconds, times.seconds[NOTHING], strict=True)])
        for turn, seconds in times.seconds.items()
    }
    spectra, momentum = extra[SPECTRA] - extra[NORMS], extra[ALL] - extra[SPECTRA]
    norms = extra[NORMS] / LOG_EVERY
    overheads = {
        "update RMS taken at every step": extra[RMS] / plain,
        "all that UpdateRMS logs taken at every step": extra[COLLECT] / plain,
        "UpdateRMS, WeightNorm every 50 steps, Spectrum every 200": (norms + spectra / SPECTRA_EVERY) / plain,
        "the same and MomentumSpectrum every 200": (norms + (spectra + momentum) / SPECTRA_EVERY) / plain,
    }
    title = f"Steps of the example ({sum(p.numel() for p in model.parameters()):,} parameters, 2,048 tokens), ms"
    milliseconds = {turn: 1e3 * value for turn, value in extra.items()}
    report(title, times.seconds, NOTHING, options.json, overheads=overheads, extra_ms=milliseconds)
    print()
    for name, share in overheads.items():
        print(f"{name:<62}{100 * share:>7.2f} % of a step")


if __name__ == "__main__":
    main()
