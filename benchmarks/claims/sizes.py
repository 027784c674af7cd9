"""The sizes of `scaling_law`: models of one kind that grow with their width, their steps, and their compute."""

from __future__ import annotations

from typing import Any

import torch

import lightning_muon as lm
from benchmarks.claims.description import Run
from benchmarks.claims.scaled_model import ScaledMoELM
from benchmarks.claims.setting import MODEL
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.flops import flops_per_token
from lightning_muon.sharding.units import ownership_plan

WIDTH_OF_STEPS = 64  # the size that trains for the setting's number of steps
PFLOP_S_DAY = 1e15 * 24 * 3600


def geometry(width: int) -> dict[str, Any]:
    """The common model with heads of one size, their number and all that has a width in proportion to ``width``."""
    return {
        **MODEL,
        "hidden_size": width,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 16,
        "head_dim": 16,
        "intermediate_size": 4 * width,
        "moe_intermediate_size": width,
    }


def active_parameters(width: int) -> int:
    """Without embedding and head."""
    return ModelConfig(**geometry(width)).num_parameters(embeddings=False).active


def num_steps(width: int, steps: int) -> int:
    """As many as make tokens proportional to the active parameters, ``steps`` at `WIDTH_OF_STEPS`."""
    return max(2, round(steps * active_parameters(width) / active_parameters(WIDTH_OF_STEPS)))


def compute(run: Run) -> float:
    """Of a run's forward and backward passes, in PFLOP/s-days: what is counted by the paper."""
    config = ModelConfig(**run.model)
    return run.steps * run.batch_size * run.seq_len * flops_per_token(config, run.seq_len) / PFLOP_S_DAY


def optimizer_compute(run: Run) -> float:
    """Of a run's optimizer, in PFLOP/s-days: the orthogonalisation of all its matrices in every step.

    What is done element by element is not counted, so AdamW has none.
    """
    with torch.device("meta"):
        optimizer = ScaledMoELM(run).make_optimizer()
    assert isinstance(optimizer, lm.Muon)
    (flops,) = ownership_plan(optimizer, world_size=1).flops  # one rank owns all matrices
    return run.steps * flops / PFLOP_S_DAY
