"""Power laws of momentum spectra over five widths of the example, from the runs to the table.

``python -m benchmarks.spectral_ladder [--json benchmarks/results/spectral_ladder.json] [--plot runs/ladder/laws.png]``

Every matrix but the routers' grows with the width: heads of one size in proportion to it, the experts' hidden width
equal to it; four layers, the first of them dense. Batch, learning rates and data are the same at all widths, because
the noise of the momentum depends on them. Steps are in proportion to the width, and so tokens to the square root of the
parameters: in proportion to these, the smallest models would end within the burn-in or the largest take too long. That
makes 2.6 tokens per parameter at the smallest width and 0.7 at the largest, where the paper has 20. Two seeds, which
also choose the windows of text. Finished runs are kept under ``runs/ladder`` and not repeated.

Five small models of one kind: what comes out says what `lightning-muon fit` does, and little about large models.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from examples.moe_lm.config import ModelConfig
from examples.moe_lm.environment import environment
from examples.moe_lm.train import main as train
from lightning_muon.scaling.ladder import read_ladder
from lightning_muon.scaling.plot import plot
from lightning_muon.scaling.report import Target, figures, fit_ladder, table

WIDTHS = (32, 48, 64, 96, 128)
SEEDS = (1, 2)
STEPS_PER_WIDTH = 10
SEQ_LEN, BATCH = 128, 8
EVERY_N_STEPS = 10
MONITOR = {"class_path": "lightning_muon.MomentumSpectrumMonitor", "init_args": {"every_n_steps": EVERY_N_STEPS}}
BASE = Path("examples/moe_lm/configs/small.yaml")
FOLDER = Path("runs/ladder")


def geometry(width: int) -> ModelConfig:
    """The example's small model, with all that depends on its width in proportion to it."""
    return ModelConfig(
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=width // 16,
        kv_lora_rank=width // 2,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
        intermediate_size=3 * width,
        moe_intermediate_size=width,
        max_seq_len=SEQ_LEN,
    )


def run(width: int, seed: int, steps_per_width: float) -> dict[str, Any]:
    """The figures of one run, from its file if it is there."""
    name, steps = f"width{width}-seed{seed}", round(steps_per_width * width)
    path = FOLDER / f"{name}-steps{steps}" / "run.json"
    if not path.exists():
        shutil.rmtree(path.parent, ignore_errors=True)  # of a run that was interrupted
        start = time.perf_counter()
        train(_arguments(geometry(width), seed, steps, path.parent.name))
        figures_of_run = {
            "width": width,
            "seed": seed,
            "steps": steps,
            "tokens": steps * BATCH * SEQ_LEN,
            "parameters": geometry(width).num_parameters().total,
            "seconds": time.perf_counter() - start,
        }
        path.write_text(json.dumps(figures_of_run, indent=1) + "\n")
    found: dict[str, Any] = json.loads(path.read_text())
    print(
        f"{path.parent.name:24} {found['parameters']:>9,} parameters, {found['tokens']:>9,} tokens,"
        f" {found['seconds']:.0f} s",
        flush=True,
    )
    return found


def _arguments(config: ModelConfig, seed: int, steps: int, name: str) -> list[str]:
    options = {
        "seed_everything": seed,
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.max_steps": steps,
        "trainer.limit_val_batches": 0,
        "trainer.log_every_n_steps": EVERY_N_STEPS,
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.callbacks": json.dumps([MONITOR]),
        "trainer.logger.init_args.save_dir": FOLDER,
        "trainer.logger.init_args.name": name,
        "data.seq_len": SEQ_LEN,
        "data.batch_size": BATCH,
        "data.window_seed": seed,
        **{f"model.config.{field}": value for field, value in config.asdict().items()},
    }
    return ["fit", f"--config={BASE}", *(f"--{key}={value}" for key, value in options.items())]


def main() -> None:
    """Train what is missing, fit, print the table, write figures and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="multiples of 16")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps-per-width", type=float, default=STEPS_PER_WIDTH)
    parser.add_argument("--quantile", default="q50")
    parser.add_argument("--target-size", type=float, default=1e7)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs = [(width, seed) for width in options.widths for seed in options.seeds]
    runs = [run(width, seed, options.steps_per_width) for width, seed in pairs]
    # these runs, not others that an earlier call with other options has left
    folders = [FOLDER / f"width{one['width']}-seed{one['seed']}-steps{one['steps']}" for one in runs]
    ladder = read_ladder(folders, options.quantile)
    target = Target(options.target_size)
    fits, unfitted = fit_ladder(ladder)
    warnings = [*ladder.warnings, *unfitted]
    print("\n" + table(fits, options.quantile, target, warnings))
    if options.json is not None:
        found = figures(fits, options.quantile, target, warnings)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**environment(), "runs": runs, **found}, indent=1) + "\n")
    if options.plot is not None:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        options.plot.write_bytes(plot(fits, options.quantile, target, options.plot.suffix))


if __name__ == "__main__":
    main()
