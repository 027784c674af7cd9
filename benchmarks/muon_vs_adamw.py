"""The demo's language model by Muon and by AdamW, each at its own best learning rates, over several seeds.

``python -m benchmarks.muon_vs_adamw [--json benchmarks/results/muon_vs_adamw.json]``

Both optimizers get the same grid procedure (learning rate of the matrices × learning rate of the rest), on a seed that
is not among those reported, and are judged at the end of their own schedule. Most of a naive comparison's gap is
AdamW's learning rate for the embedding and the head; here it is tuned. Every run is a ``make demo`` with flags;
finished runs are kept under ``runs/muon_vs_adamw`` and not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

TUNING_SEED = 100
SEEDS = (1, 2, 3)
GRIDS = {
    "muon": ((4e-3, 8e-3, 1.6e-2), (8e-3, 1.6e-2, 3.2e-2)),
    "adamw": ((1.5e-3, 3e-3, 6e-3), (8e-3, 1.6e-2, 3.2e-2)),
}
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


def main() -> None:
    """Tune, repeat over the seeds, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for optimizer, (rates, adamw_rates) in GRIDS.items():
        grid = [
            {"lr": lr, "adamw_lr": aux, "val_bpb": run(optimizer, lr, aux, TUNING_SEED, options.steps)["val_bpb"]}
            for lr, aux in itertools.product(rates, adamw_rates)
        ]
        best = min(grid, key=lambda point: point["val_bpb"])
        runs = [run(optimizer, best["lr"], best["adamw_lr"], seed, options.steps) for seed in SEEDS]
        bpb = [figures["val_bpb"] for figures in runs]
        on_edge = best["lr"] in (rates[0], rates[-1]) or best["adamw_lr"] in (adamw_rates[0], adamw_rates[-1])
        results[optimizer] = {
            "best": best,
            "best_is_on_the_edge_of_the_grid": on_edge,
            "val_bpb_by_seed": dict(zip(SEEDS, bpb, strict=True)),
            "val_bpb_mean": statistics.mean(bpb),
            "val_bpb_sd": statistics.stdev(bpb),
            "grid": grid,
            "runs": runs,
        }
    print(f"\n{'':8}{'lr':>8}{'adamw_lr':>10}  bits per byte, by seed {SEEDS}, mean ± sd")
    for optimizer, result in results.items():
        by_seed = "  ".join(f"{value:.3f}" for value in result["val_bpb_by_seed"].values())
        print(
            f"{optimizer:8}{result['best']['lr']:>8g}{result['best']['adamw_lr']:>10g}  {by_seed}"
            f"  {result['val_bpb_mean']:.3f} ± {result['val_bpb_sd']:.3f}"
        )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
