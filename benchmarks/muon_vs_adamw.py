"""The demo's language model by Muon and by AdamW, each at its own best learning rates, over several seeds.

``python -m benchmarks.muon_vs_adamw [--json benchmarks/results/muon_vs_adamw.json]``

Both optimizers are tuned by the same search over two learning rates (of the matrices, of the rest), on a seed that is
not among those reported: from a starting point to the best neighbour by a factor of two in either rate, until all four
neighbours are worse. Every run is judged at the end of its own schedule. Most of a naive comparison's gap is
AdamW's learning rate for the embedding and the head; here it is tuned. Every run is a ``make demo`` with flags;
finished runs are kept under ``runs/muon_vs_adamw`` and not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

TUNING_SEED = 100
SEEDS = (1, 2, 3)
START = {"muon": (4e-3, 1.6e-2), "adamw": (3e-3, 1.6e-2)}  # (matrices, rest)
FOLDER = Path("runs/muon_vs_adamw")


def run(optimizer: str, lr: float, adamw_lr: float, seed: int, steps: int) -> dict[str, Any]:
    """The figures of one run of the demo, from its file if it is there."""
    name = f"{optimizer}-{lr:g}-{adamw_lr:g}-seed{seed}-steps{steps}"
    path = FOLDER / f"{name}.json"
    if not path.exists():
        command = [sys.executable, "-m", "examples.moe_lm.demo", "--optimizer", optimizer, "--seed", str(seed)]
        command += ["--lr", str(lr), "--adamw-lr", str(adamw_lr), "--max-steps", str(steps)]
        FOLDER.mkdir(parents=True, exist_ok=True)
        with (FOLDER / f"{name}.log").open("w") as log:
            arguments = ["--out", str(FOLDER / name), "--json", str(path)]
            subprocess.run([*command, *arguments], stdout=log, stderr=subprocess.STDOUT, check=True)
    figures: dict[str, Any] = json.loads(path.read_text())
    print(f"{name:<48} {figures['val_bpb']:.4f} bits per byte, {figures['train_seconds']:.0f} s", flush=True)
    return figures


def tune(optimizer: str, steps: int) -> dict[tuple[float, float], float]:
    """Bits per byte of every pair of learning rates that the search has tried; the best has its neighbours there."""
    tried: dict[tuple[float, float], float] = {}

    def bits_per_byte(point: tuple[float, float]) -> float:
        if point not in tried:
            tried[point] = run(optimizer, *point, TUNING_SEED, steps)["val_bpb"]
        return tried[point]

    best = START[optimizer]
    while True:
        lr, adamw_lr = best
        neighbours = [(lr / 2, adamw_lr), (lr * 2, adamw_lr), (lr, adamw_lr / 2), (lr, adamw_lr * 2)]
        winner = min([best, *neighbours], key=bits_per_byte)
        if winner == best:
            return tried
        best = winner


def main() -> None:
    """Tune, repeat over the seeds, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for optimizer in START:
        tried = tune(optimizer, options.steps)
        lr, adamw_lr = min(tried, key=lambda point: tried[point])
        runs = [run(optimizer, lr, adamw_lr, seed, options.steps) for seed in SEEDS]
        bpb = [figures["val_bpb"] for figures in runs]
        results[optimizer] = {
            "lr": lr,
            "adamw_lr": adamw_lr,
            "val_bpb_by_seed": dict(zip(SEEDS, bpb, strict=True)),
            "val_bpb_mean": statistics.mean(bpb),
            "val_bpb_sd": statistics.stdev(bpb),
            "tried": [{"lr": lr, "adamw_lr": aux, "val_bpb": value} for (lr, aux), value in tried.items()],
            "runs": runs,
        }
    print(f"\n{'':8}{'lr':>8}{'adamw_lr':>10}  bits per byte, by seed {SEEDS}, mean ± sd")
    for optimizer, result in results.items():
        by_seed = "  ".join(f"{value:.3f}" for value in result["val_bpb_by_seed"].values())
        print(
            f"{optimizer:8}{result['lr']:>8g}{result['adamw_lr']:>10g}  {by_seed}"
            f"  {result['val_bpb_mean']:.3f} ± {result['val_bpb_sd']:.3f}"
        )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
