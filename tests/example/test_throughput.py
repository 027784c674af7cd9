"""The benchmark of tokens per second: what it counts, and that the documented figures are the committed ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import throughput
from examples.moe_lm.config import ModelConfig
from tests.example.test_model import TINY

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def test_whole_windows_are_counted_and_steps_train() -> None:
    found = throughput.measure(ModelConfig(**TINY), 40, torch.device("cpu"), "fp32", rounds=2)
    assert found["tokens"] == 2 * TINY["max_seq_len"]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found["seconds"].values())
    assert set(found["seconds"]) == set(throughput.VARIANTS)
    assert all(0 <= share < 1 for share in found["optimizer_share"].values())


def test_less_than_a_window_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["throughput", "--tokens", "16"])
    with pytest.raises(SystemExit):
        throughput.main()
    assert "whole windows of 128 tokens" in capsys.readouterr().err


def test_documented_table_is_the_committed_one() -> None:
    rows = json.loads((RESULTS / "throughput.json").read_text())["rows"]
    assert throughput.table(rows) in (RESULTS / "README.md").read_text()
