"""Trains the model from the command line.

``python examples/moe_lm/train.py fit --config examples/moe_lm/configs/small.yaml``
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: the repository's root makes `examples` importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from lightning.pytorch.cli import ArgsType, LightningCLI

import lightning_muon  # noqa: F401 (registers the strategies' names)
from examples.moe_lm.data import TextDataModule
from examples.moe_lm.model import MoELM


def main(args: ArgsType = None, run: bool = True) -> LightningCLI:
    """Reads the command line (or ``args``) and, with ``run``, does what it says."""
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
    return LightningCLI(
        MoELM, TextDataModule, args=args, run=run, seed_everything_default=1, save_config_kwargs={"overwrite": True}
    )


if __name__ == "__main__":
    main()
