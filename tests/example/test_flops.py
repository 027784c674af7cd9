"""Counted operations, and the gate's scale, against torch's counter and the published figures."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from examples.moe_lm.config import AttentionKind, ModelConfig
from examples.moe_lm.flops import flops_per_token, num_tokens, num_windows
from examples.moe_lm.gate_scale import gate_scale
from examples.moe_lm.model import MoELM, next_token_nll
from tests.example.test_model import TINY

LOOPED = {**TINY, "moe_intermediate_size": 17}  # torch's counter has no formula for the grouped product


@pytest.mark.parametrize(("attention", "q_lora_rank"), [("gqa", None), ("mla", None), ("mla", 12)])
def test_formula_equals_torchs_counter(attention: AttentionKind, q_lora_rank: int | None) -> None:
    model = MoELM(ModelConfig(attention=attention, q_lora_rank=q_lora_rank, **LOOPED))
    windows = torch.randint(257, (3, 13))
    with sdpa_kernel(SDPBackend.MATH):  # as products that torch's counter knows
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(windows[:, :-1])
        with FlopCounterMode(display=False) as step:
            next_token_nll(model(windows[:, :-1]), windows[:, 1:]).mean().backward()
    tokens = num_tokens(windows)
    assert forward.get_total_flops() == tokens * flops_per_token(model.config, 12, training=False)
    assert step.get_total_flops() == tokens * flops_per_token(model.config, 12)


def test_throughput_monitor_logs_the_operations(tmp_path: Path) -> None:
    model = MoELM(ModelConfig(**TINY))
    logger = CSVLogger(tmp_path)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[ThroughputMonitor(num_windows, num_tokens, window_size=3)],
        logger=logger,
        max_steps=6,
        log_every_n_steps=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(torch.randint(257, (12, 9)), batch_size=2))
    assert model.flops_per_batch == 2 * 8 * flops_per_token(model.config, 8)
    assert "train/device/flops_per_sec" in (Path(logger.log_dir) / "metrics.csv").read_text()


@pytest.mark.parametrize(
    ("num_experts", "top_k", "expected"),
    [(64, 6, 2.446), (8, 2, 1.409), (16, 2, 1.412), (32, 4, 1.997), (256, 8, 2.827)],
)
def test_gate_scale_is_the_published_one(num_experts: int, top_k: int, expected: float) -> None:
    assert gate_scale(num_experts, top_k) == pytest.approx(expected, abs=1e-3)
