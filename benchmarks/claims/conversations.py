"""Fine-tunes a run's checkpoint on conversations, and says what came out."""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path
from typing import Any

from benchmarks.claims.description import Run
from examples.moe_lm.data import TextDataModule
from examples.moe_lm.finetune import fine_tune
from examples.moe_lm.instructions import InstructionDataModule


def train_on_conversations(run: Run, trainer_options: dict[str, Any], checkpoint: Path | None) -> dict[str, Any]:
    """Fine-tune from the run's ``start_from``.

    Args:
        run: Its ``files`` are JSON Lines; ``None`` takes the standard library's functions and their docstrings.
        trainer_options: Of Lightning's Trainer.
        checkpoint: Where to leave the weights.

    Returns:
        ``val_loss`` and ``val_loss_before`` in nats per token of held-out answers, ``text_loss`` and
        ``text_loss_before`` in nats per byte of plain text, ``diverged``, ``seconds``, ``text_sha256``.
    """
    assert run.start_from is not None
    files = None if run.files is None else list(run.files)
    # Both hold out the same files, those that the checkpoint has not seen either: by one hash and one fraction.
    data = InstructionDataModule(files, seq_len=run.seq_len, batch_size=run.batch_size)
    text = TextDataModule(files, seq_len=run.seq_len, batch_size=run.batch_size, val_windows=run.val_windows)
    start = time.perf_counter()
    figures: dict[str, Any] = {}
    diverged: str | None = None
    try:
        figures = fine_tune(
            run.start_from,
            data,
            optimizer=run.optimizer,
            lr=run.lr,
            adamw_lr=run.adamw_lr,
            weight_decay=run.weight_decay,
            max_steps=run.steps,
            seed=run.seed,
            text=text,
            save_to=checkpoint,
            trainer_options=trainer_options,
        )
        if not math.isfinite(figures["val_loss"]):
            diverged = "the validation loss"
    except FloatingPointError as error:  # Muon refuses gradients that are not finite, for AdamW as well
        diverged = str(error)
    to_nats = math.log(2)
    return {
        "val_loss": None if diverged else figures["val_loss"],
        "val_loss_before": None if diverged else figures["val_loss_before"],
        "text_loss": None if diverged else to_nats * figures["text_bpb"],
        "text_loss_before": None if diverged else to_nats * figures["text_bpb_before"],
        "train_loss": None,
        "diverged": diverged,
        "seconds": round(time.perf_counter() - start, 1),
        "text_sha256": _sha256(data),
        "measured": {},
    }


def _sha256(data: InstructionDataModule) -> str:
    """Of the conversations' tokens, in their order."""
    digest = hashlib.sha256()
    for example in (*data.train_set, *data.val_set):
        digest.update(example.ids_T.numpy().tobytes())
    return digest.hexdigest()
