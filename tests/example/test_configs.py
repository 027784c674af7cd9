"""The YAML files say what they hold, and run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from examples.moe_lm.config import ModelConfig
from examples.moe_lm.gate_scale import gate_scale
from examples.moe_lm.train import main as train

CONFIGS = Path(__file__).parents[2] / "examples/moe_lm/configs"

# Lightning 2.6's own use of torch, and one process where the machine could have more
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec:FutureWarning",
    "ignore:.*does not have many workers",
    "ignore:LightningCLI's args parameter",
)


def geometry(name: str) -> ModelConfig:
    return ModelConfig(**yaml.safe_load((CONFIGS / name).read_text())["model"]["config"])


@pytest.mark.parametrize("name", ["100m.yaml", "1b.yaml"])
def test_first_line_has_the_parameter_counts(name: str) -> None:
    config = geometry(name)
    counts = [*config.num_parameters(), *config.num_parameters(embeddings=False)]
    said = re.findall(r"\d+\.\d", (CONFIGS / name).read_text().splitlines()[0])
    assert said == [f"{count / 1e6:.1f}" for count in counts]


@pytest.mark.parametrize("name", ["small.yaml", "100m.yaml", "1b.yaml", "moonlight_16b_a3b.yaml"])
def test_gate_scale_follows_from_the_experts(name: str) -> None:
    config = geometry(name)
    expected = gate_scale(config.n_routed_experts, config.num_experts_per_tok, num_samples=20_000)
    assert config.routed_scaling_factor == pytest.approx(expected, abs=0.01)


def test_larger_models_configuration_runs_with_a_tiny_geometry(tmp_path: Path) -> None:
    tiny = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())
    overrides = {
        "trainer.accelerator": "cpu",
        "trainer.strategy": "auto",  # a process group would leave its environment variables
        "trainer.precision": "32-true",
        "trainer.max_steps": 4,
        "trainer.log_every_n_steps": 2,
        "trainer.val_check_interval": 4,
        "trainer.enable_progress_bar": "false",
        "trainer.logger.init_args.save_dir": tmp_path,
        "data.seq_len": 32,
        "data.batch_size": 2,
        "data.val_windows": 2,
        "data.num_workers": 0,
        **{f"model.config.{field}": value for field, value in tiny["model"]["config"].items()},
    }
    arguments = [f"--{key}={value}" for key, value in overrides.items()]
    cli = train(["fit", f"--config={CONFIGS / '1b.yaml'}", *arguments])
    assert cli.trainer.global_step == 4
    assert cli.model.flops_per_batch > 0
    assert cli.model.model.activation_checkpointing
    assert "val/loss" in cli.trainer.callback_metrics
