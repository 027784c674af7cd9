"""Trains one run with Lightning's Trainer, on one device, and says what came out."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from typing_extensions import override

import lightning_muon as lm
from benchmarks.claims.conversations import train_on_conversations
from benchmarks.claims.description import Measure, Run
from benchmarks.claims.scaled_model import ScaledMoELM
from examples.moe_lm.data import TextDataModule
from examples.moe_lm.environment import environment

_MONITORS: dict[Measure, type[lm.UpdateRMSMonitor] | type[lm.WeightNormMonitor] | type[lm.SpectrumMonitor]] = {
    "updates": lm.UpdateRMSMonitor,
    "weights": lm.WeightNormMonitor,
    "spectra": lm.SpectrumMonitor,
}


class Kept(Logger):
    """A logger that keeps what the monitors say.

    Attributes:
        values: For each key of a monitor, ``(step, value)`` in order.
    """

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, list[tuple[int, float]]] = {}

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keeps them."""
        for key, value in metrics.items():
            if key.startswith(("muon/", "attention/")):
                self.values.setdefault(key, []).append((int(step or 0), float(value)))

    @override
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run's description says it all."""


class Losses(Callback):
    """Keeps every step's training loss on the device, so that nothing waits for it, and what validations find.

    Attributes:
        losses: Of each step.
        validated: ``(step, loss)`` of each validation.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.validated: list[tuple[int, float]] = []

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))

    def end(self) -> float:
        """The mean over the last tenth of the steps."""
        last = self.losses[-math.ceil(len(self.losses) / 10) :]
        return torch.stack(last).mean().item()


def train(run: Run, device: str = "cpu", checkpoint: Path | None = None) -> dict[str, Any]:
    """Trains a run from its beginning to its end.

    Args:
        run: The run.
        device: ``"cpu"``, on one thread, or ``"cuda:0"``.
        checkpoint: Where to leave the weights, as a checkpoint that `MoELM.load_from_checkpoint` loads.

    Returns:
        ``val_loss`` and ``train_loss`` in nats per byte (the latter over the last tenth of the steps), ``None`` if
        the run diverged; ``diverged`` says what was not finite, or ``None``. ``measured``: by key of the monitors,
        ``[step, value]``. ``text_sha256``, ``seconds``, ``environment``.

    Raises:
        RuntimeError: Training ended before its last step.
    """
    _be_quiet()
    where = torch.device(device)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
    L.seed_everything(run.seed, verbose=False)
    options: dict[str, Any] = {
        "accelerator": "gpu" if where.type == "cuda" else "cpu",
        "devices": [where.index or 0] if where.type == "cuda" else 1,
        "gradient_clip_val": 1.0,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    about = {"environment": {**environment(), "device": _name(where)}}
    if run.start_from is not None:
        return {**train_on_conversations(run, {**options, "logger": False}, checkpoint), **about}
    data = TextDataModule(
        files=None if run.files is None else list(run.files),
        seq_len=run.seq_len,
        batch_size=run.batch_size,
        train_windows=run.steps * run.batch_size,  # one epoch
        window_seed=run.seed,
        val_windows=run.val_windows,
    )
    model = ScaledMoELM(run)
    is_followed = "loss" in run.measure
    kept, losses = Kept(), Losses()
    trainer = L.Trainer(
        max_steps=run.steps,
        max_epochs=1,
        log_every_n_steps=run.interval,
        val_check_interval=run.interval if is_followed else None,
        logger=kept,
        callbacks=[losses, *_measuring(run)],
        **options,
    )
    start = time.perf_counter()
    diverged: str | None = None
    try:
        trainer.fit(model, datamodule=data)  # validates after the last step
    except FloatingPointError as error:  # Muon refuses gradients that are not finite, for AdamW as well
        diverged = str(error)
    if diverged is None and trainer.global_step != run.steps:
        raise RuntimeError(f"training ended after step {trainer.global_step} of {run.steps}")
    val_loss = math.nan if diverged else float(trainer.callback_metrics["val/loss"])
    if not math.isfinite(val_loss):
        diverged = diverged or "the validation loss"
    measured = {**kept.values, **({"val/loss": losses.validated} if is_followed else {})}
    if checkpoint is not None:
        trainer.save_checkpoint(checkpoint, weights_only=True)
    return {
        "val_loss": None if diverged else val_loss,
        "train_loss": None if diverged else losses.end(),
        "diverged": diverged,
        "seconds": round(time.perf_counter() - start, 1),
        "text_sha256": data.describe()["text_sha256"],
        "measured": {key: [list(point) for point in points] for key, points in measured.items()},
        **about,
    }


def _measuring(run: Run) -> list[Callback]:
    kinds = [_MONITORS[name] for name in run.measure if name in _MONITORS]
    monitors: list[Callback] = [kind(every_n_steps=run.interval, mode="detailed") for kind in kinds]
    if run.watch_logits or run.clip_tau is not None:
        tau = math.inf if run.clip_tau is None else run.clip_tau
        clip = lm.QKClip(tau, log_only=run.clip_tau is None, every_n_steps=run.interval, mode="detailed")
        monitors.append(clip)
    return monitors


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _be_quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning's hints about loader processes and its own use of torch: nothing of it is about this run
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|Trainer already configured)")
