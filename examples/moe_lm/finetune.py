"""Fine-tunes a checkpoint on conversations, with Muon or AdamW, the loss on answers alone; or trains it on, on texts.

``python examples/moe_lm/finetune.py CKPT [--data FILE.jsonl …] [--tokenizer DIR] [--optimizer muon] [--lr 5e-5]``
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root makes `examples` importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

import lightning_muon as lm
from examples.moe_lm.data import VOCAB_SIZE, TextDataModule
from examples.moe_lm.instruction_model import InstructionLM
from examples.moe_lm.instructions import InstructionDataModule
from examples.moe_lm.optim import OptimizerName

__all__ = ["fine_tune", "main"]


def fine_tune(
    checkpoint: str | Path,
    data: InstructionDataModule,
    *,
    optimizer: OptimizerName = "muon",
    lr: float = 5e-5,
    adamw_lr: float | None = None,
    weight_decay: float = 0.1,
    warmup_fraction: float = 0.03,
    epochs: int = 2,
    max_steps: int = -1,
    seed: int = 0,
    activation_checkpointing: bool = False,
    text: TextDataModule | None = None,
    save_to: str | Path | None = None,
    trainer_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fine-tune a checkpoint once, from its weights and a fresh optimizer state.

    Args:
        checkpoint: Of ``MoELM``: by ``convert.py from-hf`` or by a Trainer.
        data: The conversations.
        optimizer: ``"muon"`` (matrices by Muon, the rest by AdamW) or ``"adamw"``.
        lr: Peak learning rate; it falls linearly to 0.
        adamw_lr: That of embedding, head and norms; ``None`` takes ``lr``.
        weight_decay: Decoupled.
        warmup_fraction: Share of the steps over which the rate rises.
        epochs: Passes over the conversations.
        max_steps: Optimizer steps instead, if positive.
        seed: Of the conversations' order; nothing else is random.
        activation_checkpointing: Keep only the layers' inputs for the backward pass.
        text: Text whose loss before and after tells what was forgotten.
        save_to: A file for the weights afterwards, which ``convert.py to-hf`` reads.
        trainer_options: Of the Trainer: accelerator, devices, strategy, precision, logger, callbacks, ….

    Returns:
        The arguments, and the figures: ``val_loss_before`` and ``val_loss`` in nats per token of held-out answers,
        ``text_bpb_before`` and ``text_bpb`` in bits per token (a byte, for byte models), ``steps``, ``seconds``.
        The same on every rank.

    Raises:
        CheckpointError: The checkpoint is missing, torn or altered.
        ValueError: The tokens are more than the checkpoint knows.
    """
    data.seed = seed
    description = data.describe()
    model = InstructionLM.from_file(
        checkpoint,
        optimizer=optimizer,
        lr=lr,
        adamw_lr=adamw_lr,
        weight_decay=weight_decay,
        warmup_fraction=warmup_fraction,
        activation_checkpointing=activation_checkpointing,
    )
    if data.tokenizer is None and model.config.vocab_size != VOCAB_SIZE:
        raise ValueError(
            f"{checkpoint} knows {model.config.vocab_size} tokens, and without a tokenizer a token is a byte: name the"
            " folder of its tokenizer"
        )
    if data.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{checkpoint} knows {model.config.vocab_size} tokens, and the conversations have {data.vocab_size}: name"
            " its own tokenizer"
        )
    length = {"max_steps": max_steps, "max_epochs": -1} if max_steps > 0 else {"max_epochs": epochs}
    defaults: dict[str, Any] = {"gradient_clip_val": 1.0, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    trainer = L.Trainer(**{**defaults, **(trainer_options or {}), **length})
    before = _validate(trainer, model, data, text)
    started = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - started
    after = _validate(trainer, model, data, text)
    if save_to is not None:
        trainer.save_checkpoint(save_to, weights_only=True)
    return {
        "optimizer": optimizer,
        "lr": lr,
        "adamw_lr": adamw_lr,
        "weight_decay": weight_decay,
        "seed": seed,
        "batch_size": data.batch_size,
        "steps": trainer.global_step,
        "seconds": round(seconds, 1),
        **{f"{name}_before": value for name, value in before.items()},
        **after,
        **{f"conversations_{name}": value for name, value in description.items()},
    }


def _validate(
    trainer: L.Trainer, model: InstructionLM, data: InstructionDataModule, text: TextDataModule | None
) -> dict[str, float]:
    figures = {"val_loss": float(trainer.validate(model, data, verbose=False)[0]["val/loss"])}
    if text is not None:
        figures["text_bpb"] = float(trainer.validate(model, text, verbose=False)[0]["val/bpb"])
    return figures


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CKPT", help="by convert.py from-hf, or by a Trainer")
    parser.add_argument(
        "--data", nargs="+", default=None, help="JSON Lines; by default the standard library's functions"
    )
    parser.add_argument("--tokenizer", default=None, help="folder of a Hugging Face tokenizer; by default bytes")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the tokenizer's folder run its code")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=5e-5, help="at its peak; it falls to 0")
    parser.add_argument(
        "--adamw-lr", type=float, default=None, help="of embedding, head and norms; by default the same"
    )
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup-fraction", type=float, default=0.03, help="share of the steps")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--max-steps", type=int, default=-1, help="optimizer steps in place of epochs")
    parser.add_argument("--seq-len", type=int, default=256, help="longer conversations are left out")
    parser.add_argument("--batch-size", type=int, default=32, help="conversations per batch, over all ranks")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step")
    parser.add_argument("--activation-checkpointing", action="store_true", help="less memory, a third more work")
    parser.add_argument("--seed", type=int, default=0, help="of the conversations' order")
    parser.add_argument("--strategy", default="muon_zero1", help="muon_zero1, or muon_fsdp for what does not fit")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="folder for logs and the checkpoint")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Fine-tunes, saves ``OUT/version_N/last.ckpt``, prints and returns the figures."""
    options = parse_args(args)
    logger = TensorBoardLogger(options.out.parent, name=options.out.name, default_hp_metric=False)
    data = InstructionDataModule(
        options.data,
        options.tokenizer,
        options.trust_remote_code,
        seq_len=options.seq_len,
        batch_size=options.batch_size,
    )
    saved = Path(logger.log_dir) / "last.ckpt"
    figures = fine_tune(
        options.checkpoint,
        data,
        optimizer=options.optimizer,
        lr=options.lr,
        adamw_lr=options.adamw_lr,
        weight_decay=options.weight_decay,
        warmup_fraction=options.warmup_fraction,
        epochs=options.epochs,
        max_steps=options.max_steps,
        seed=options.seed,
        activation_checkpointing=options.activation_checkpointing,
        save_to=saved,
        trainer_options={
            "strategy": options.strategy,
            "accelerator": options.accelerator,
            "devices": options.devices,
            "num_nodes": options.num_nodes,
            "precision": options.precision,
            "logger": logger,
            "log_every_n_steps": 5,
            "accumulate_grad_batches": options.accumulate,
            "callbacks": [lm.UpdateRMSMonitor(), lm.WeightNormMonitor(), LearningRateMonitor("step")],
            "enable_model_summary": False,
        },
    )
    _report(figures, saved, options.json)
    return figures


@rank_zero_only
def _report(figures: dict[str, Any], saved: Path, path: Path | None) -> None:
    text = json.dumps(figures, indent=2)
    print(f"{text}\nweights: {saved}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


if __name__ == "__main__":
    main()
