"""What the experiments' tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.claims.description import Run

ROOT = Path(__file__).parents[2]
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "max_seq_len": 16,
}


def tiny_run(optimizer: str = "muon", steps: int = 4, seed: int = 1, **others: object) -> Run:
    fields = {"lr": 1e-2, "adamw_lr": 2e-2, "model": TINY, "batch_size": 4, "seq_len": 16, "val_windows": 4}
    return Run(optimizer, steps=steps, seed=seed, **{"files": (str(ROOT / "docs" / "fsdp.md"),), **fields, **others})


def few_steps(steps: int, seeds: Sequence[int], files: Path, folder: Path) -> list[str]:
    """What an experiment's command is told so that all of its runs take seconds: the smallest search, on one seed."""
    search = ["--steps", str(steps), "--grid", "tiny", "--max-growths", "0", "--tuning-seeds", "100"]
    text = ["--val-windows", "4", "--files", str(files)]
    return [*search, *text, "--seeds", *map(str, seeds), "--folder", str(folder), "--devices", "cpu", "cpu"]


@pytest.fixture(autouse=True)
def no_trace_of_a_run() -> Iterator[None]:
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(before)
    torch.set_float32_matmul_precision(precision)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
