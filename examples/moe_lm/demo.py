"""``make demo``: trains the small model on two CPU processes, draws what happened and prints a summary.

``python -m examples.moe_lm.demo [--optimizer adamw] [--seed 1] [--max-steps 900] [--devices 2] [--json PATH]``
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root makes `examples` importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

import lightning_muon as lm
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.data import SEPARATOR, TextDataModule
from examples.moe_lm.environment import environment
from examples.moe_lm.model import MoELM
from examples.moe_lm.report import draw_loss, draw_matrices, read_scalars
from examples.moe_lm.spectra import draw_spectra, read_spectra

SEQ_LEN = 128
BATCH_SIZE = 16  # windows over all ranks: 2048 tokens per step
# (matrices, rest): the best of each over 600 steps, by the same search: python -m benchmarks.muon_vs_adamw
LEARNING_RATES: dict[str, tuple[float, float]] = {"muon": (8e-3, 1.6e-2), "adamw": (3e-3, 3.2e-2)}


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=None, help="of the matrices; by default the optimizer's best")
    parser.add_argument("--adamw-lr", type=float, default=None, help="of the rest, with --lr; by default the same")
    parser.add_argument("--strategy", default="muon_zero1", help="muon_zero1, or ddp to compare")
    parser.add_argument("--devices", type=int, default=2, help="CPU processes")
    parser.add_argument("--max-steps", type=int, default=900, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for logs, pictures, checkpoints")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    return parser.parse_args(args)


class StateBytes(Callback):
    """Adds up each rank's optimizer state while the processes still talk to each other.

    Attributes:
        per_rank: bytes of all tensors in ``optimizer.state``, by rank.
        seconds: wall time of the training, validations included.
    """

    def __init__(self) -> None:
        self.per_rank: list[int] = []
        self.seconds = 0.0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = -time.perf_counter()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += time.perf_counter()
        tensors = (value for state in trainer.optimizers[0].state.values() for value in state.values())
        mine = sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))
        self.per_rank = [mine] * trainer.world_size
        if dist.is_initialized():
            dist.all_gather_object(self.per_rank, mine)


def sample(model: MoELM, prompt: str, num_bytes: int, seed: int) -> str:
    """``prompt``, as if from the middle of a file, continued by ``num_bytes`` bytes or up to the file's end."""
    generator = torch.Generator().manual_seed(seed)
    tokens = model.generate(torch.tensor([list(prompt.encode())]), num_bytes, 0.7, generator)[0].tolist()
    end = tokens.index(SEPARATOR) if SEPARATOR in tokens else len(tokens)
    return bytes(tokens[:end]).decode(errors="replace")


def train(options: argparse.Namespace) -> tuple[L.Trainer, MoELM, TextDataModule, StateBytes]:
    """Trains; in every process."""
    # Lightning 2.6's own use of torch; nothing a reader of the demo can do about it.
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    torch.set_num_threads(1)  # one per process: the processes share the cores
    L.seed_everything(options.seed)
    state_bytes = StateBytes()
    every = max(1, options.max_steps // 30)  # about thirty points per curve
    trainer = L.Trainer(
        accelerator="cpu",
        devices=options.devices,
        strategy=options.strategy,
        max_steps=options.max_steps,
        max_epochs=1,
        gradient_clip_val=1.0,
        log_every_n_steps=min(5, every),
        enable_model_summary=False,
        val_check_interval=max(1, options.max_steps // 6),
        check_val_every_n_epoch=None,
        logger=TensorBoardLogger(options.out.parent, name=options.out.name, default_hp_metric=False),
        callbacks=[
            lm.UpdateRMSMonitor(every_n_steps=every),
            lm.WeightNormMonitor(every_n_steps=every),
            lm.SpectrumMonitor(every_n_steps=every),
            lm.ExpertLoadMonitor(every_n_steps=every),
            LearningRateMonitor("step"),
            ModelCheckpoint(monitor="val_loss", filename="{step}-{val_loss:.3f}", save_last=True),
            state_bytes,
        ],
    )
    data = TextDataModule(
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZE,
        train_windows=options.max_steps * BATCH_SIZE,  # one epoch; 900 steps see a fifth of the text
        window_seed=options.seed,
    )
    lr, adamw_lr = (options.lr, options.adamw_lr) if options.lr else LEARNING_RATES[options.optimizer]
    model = MoELM(ModelConfig(max_seq_len=SEQ_LEN), optimizer=options.optimizer, lr=lr, adamw_lr=adamw_lr)
    trainer.fit(model, data)
    return trainer, model, data, state_bytes


def report(
    options: argparse.Namespace, trainer: L.Trainer, model: MoELM, data: TextDataModule, state_bytes: StateBytes
) -> dict[str, Any]:
    """Pictures, summary and a sample of text; on rank zero."""
    assert trainer.logger is not None
    assert trainer.logger.log_dir is not None
    folder = Path(trainer.logger.log_dir)
    scalars = read_scalars(folder)
    tokens_per_step = BATCH_SIZE * SEQ_LEN
    run = f"{options.optimizer}, {options.strategy}, {options.devices} processes"
    pictures = [
        draw_loss(scalars, folder / "loss.png", tokens_per_step, run),
        draw_matrices(scalars, folder / "matrices.png", run),
        draw_spectra(read_spectra(folder), folder / "spectra.png", run),
    ]
    rates = [value for _, value in scalars.get("train/tokens_per_sec", [])]
    # sharded, all processes together hold what each would hold of a replicated state
    replicated = sum(state_bytes.per_rank) if options.strategy == "muon_zero1" else state_bytes.per_rank[0]
    total, active = model.config.num_parameters()
    figures: dict[str, Any] = {
        "optimizer": options.optimizer,
        "strategy": options.strategy,
        "devices": options.devices,
        "lr": model.lr,
        "adamw_lr": model.adamw_lr,
        "seed": options.seed,
        "steps": trainer.global_step,
        "tokens": trainer.global_step * tokens_per_step,
        "parameters_total": total,
        "parameters_active": active,
        "val_loss": float(trainer.callback_metrics["val/loss"]),
        "val_perplexity": float(trainer.callback_metrics["val/perplexity"]),
        "val_bpb": float(trainer.callback_metrics["val/bpb"]),
        "tokens_per_sec_median": sorted(rates)[len(rates) // 2] if rates else None,
        "train_seconds": round(state_bytes.seconds, 1),
        "optimizer_state_bytes_per_rank": state_bytes.per_rank,
        "optimizer_state_bytes_replicated": replicated,
        **data.describe(),
        **environment(),
    }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    shares = " ".join(f"{number / 2**20:.2f}" for number in state_bytes.per_rank)
    rows = {
        "parameters": f"{total / 1e6:.2f} M, {active / 1e6:.2f} M active per token",
        "trained": f"{figures['steps']} steps, {figures['tokens'] / 1e6:.2f} M tokens, {state_bytes.seconds:.0f} s",
        "validation loss": f"{figures['val_loss']:.3f} nats per byte",
        "bits per byte": f"{figures['val_bpb']:.3f}",
        "tokens per second": f"{figures['tokens_per_sec_median']:,.0f} (median, all processes)" if rates else "-",
        "optimizer state": f"{shares} MiB per process; {replicated / 2**20:.2f} MiB on each if it were replicated",
        "pictures": " ".join(str(picture) for picture in pictures),
    }
    width = max(map(len, rows))
    print(f"\n{run}, seed {options.seed}")
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items()))
    print("\nthe model continues 'def ':\n")
    print("\n".join("  | " + line for line in sample(model, "def ", 300, options.seed).splitlines()))
    print(f"\ntensorboard --logdir {options.out}")
    return figures


def main(args: list[str] | None = None) -> None:
    """The whole demo. Lightning starts this script again for every further process; those only train."""
    options = parse_args(args)
    trainer, model, data, state_bytes = train(options)
    if trainer.is_global_zero:
        report(options, trainer, model, data, state_bytes)


if __name__ == "__main__":
    main()
