"""The three ways to train the example, for a few steps, as a user starts them: two processes each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.moe_lm.model import MoELM
from examples.moe_lm.report import read_scalars
from examples.moe_lm.spectra import read_spectra

ROOT = Path(__file__).parents[2]


def run(folder: Path, *command: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_demo(tmp_path: Path, optimizer: str) -> None:
    figures_file = tmp_path / "figures.json"
    command = ["-m", "examples.moe_lm.demo", "--max-steps", "12", "--optimizer", optimizer]
    out = run(tmp_path, *command, "--out", str(tmp_path / "run"), "--json", str(figures_file))
    figures = json.loads(figures_file.read_text())
    assert figures["steps"] == 12
    assert figures["val_bpb"] < 8.01  # log2(257): what a uniform guess needs
    shares = figures["optimizer_state_bytes_per_rank"]
    assert sum(shares) == figures["optimizer_state_bytes_replicated"]
    assert max(shares) <= 1.15 * sum(shares) / len(shares)
    folder = tmp_path / "run" / "version_0"
    for picture in ("loss.png", "matrices.png", "spectra.png"):
        assert (folder / picture).stat().st_size > 10_000
    assert read_spectra(folder)
    assert {"moe/max_vio/_mean", "moe/router_entropy/model.layers.3.mlp"} <= read_scalars(folder).keys()
    assert f"tensorboard --logdir {tmp_path / 'run'}" in out
    assert f"{figures['val_bpb']:.3f}" in out
    checkpoint = folder / "checkpoints" / "last.ckpt"
    logits = MoELM.load_from_checkpoint(checkpoint, weights_only=True)(torch.zeros(2, 5, dtype=torch.int64))
    assert logits.shape == (2, 5, 257)


def test_command_line_trains(tmp_path: Path) -> None:
    config = ROOT / "examples" / "moe_lm" / "configs" / "tiny.yaml"
    script = ROOT / "examples" / "moe_lm" / "train.py"
    run(tmp_path, str(script), "fit", "--config", str(config), "--trainer.max_steps", "10")
    assert list(tmp_path.rglob("*.ckpt"))


def test_fabric_loop_trains(tmp_path: Path) -> None:
    script = ROOT / "examples" / "moe_lm" / "train_fabric.py"
    options = ["--max-steps", "4", "--val-every", "4", "--log-every", "2", "--accumulate", "2"]
    out = run(tmp_path, str(script), *options, "--out", str(tmp_path / "run"))
    assert "step 4: " in out
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert saved["step"] == 4
