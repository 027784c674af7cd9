"""The LightningModule, the command line and the Fabric loop."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

import lightning_muon as lm
from examples.moe_lm import train, train_fabric
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM, next_token_nll, validation_figures
from examples.moe_lm.optim import is_auxiliary, warmup_cosine
from tests.example.test_model import TINY

pytestmark = [
    # Lightning 2.6's own use of torch, once a Trainer loads batches.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
]

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples/moe_lm/configs"
LARGE = {"100m.yaml", "1b.yaml", "moonlight_16b_a3b.yaml"}
OVERLAYS = {"adamw.yaml", "moonlight_16b_a3b.yaml"}  # put after another file


def quiet_trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(tmp_path),
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**{**defaults, **options})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_builds_through_the_cli(path: Path) -> None:
    names = ["small.yaml", path.name] if path.name in OVERLAYS else [path.name]
    args = [argument for name in names for argument in ("--config", str(CONFIGS / name))]
    with torch.device("meta" if path.name in LARGE else "cpu"):
        cli = train.main([*args, "--trainer.accelerator=cpu"], run=False)
    assert isinstance(cli.model, MoELM)
    assert type(cli.trainer.strategy).__name__ == "MuonZero1Strategy"
    assert any(isinstance(callback, lm.ExpertLoadMonitor) for callback in cli.trainer.callbacks)
    if path.name == "adamw.yaml":
        assert cli.model.optimizer_name == "adamw"
        assert cli.model.config.hidden_size == 128  # the overlay changes nothing else


def test_the_small_config_is_what_the_demo_trains() -> None:
    from examples.moe_lm import demo

    cli = train.main(["--config", str(CONFIGS / "small.yaml")], run=False)
    assert cli.model.config == ModelConfig(max_seq_len=demo.SEQ_LEN)
    assert cli.datamodule.seq_len == demo.SEQ_LEN
    assert cli.datamodule.batch_size == demo.BATCH_SIZE
    assert (cli.model.lr, cli.model.adamw_lr) == demo.LEARNING_RATES["muon"]
    overlay = ["--config", str(CONFIGS / "small.yaml"), "--config", str(CONFIGS / "adamw.yaml")]
    model = train.main(overlay, run=False).model
    assert (model.lr, model.adamw_lr) == demo.LEARNING_RATES["adamw"]


def test_bits_per_byte_is_the_loss_in_bits(tmp_path: Path) -> None:
    assert float(validation_figures(torch.tensor(math.log(2)))["val/bpb"]) == pytest.approx(1.0)
    assert float(validation_figures(torch.tensor(math.log(256)))["val/perplexity"]) == pytest.approx(256, rel=1e-5)
    model = MoELM(ModelConfig(initializer_range=0.2, **TINY))
    windows = torch.randint(257, (7, 12))
    # Batches of unequal size: the mean is over tokens, not over batches.
    figures = quiet_trainer(tmp_path).validate(model, DataLoader(windows, batch_size=3), verbose=False)[0]
    with torch.no_grad():
        expected = next_token_nll(model(windows[:, :-1]), windows[:, 1:]).mean().item()
    assert figures["val/loss"] == pytest.approx(expected, rel=1e-6)
    assert figures["val/bpb"] == pytest.approx(expected / math.log(2), rel=1e-6)
    assert figures["val/perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_trains_saves_and_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MoELM(ModelConfig(**TINY), lr=1e-2)
    windows = torch.arange(64 * 9).view(64, 9) % 7  # seven tokens in a row, over and over
    trainer = quiet_trainer(tmp_path, max_steps=30, gradient_clip_val=1.0, log_every_n_steps=1)
    loader = DataLoader(windows, batch_size=8)
    before = trainer.validate(model, loader, verbose=False)[0]["val/loss"]
    trainer.fit(model, loader, loader)
    after = trainer.validate(model, loader, verbose=False)[0]["val/loss"]
    assert before > 5
    assert after < 0.5 * before
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert torch.load(tmp_path / "model.ckpt", weights_only=True)["hyper_parameters"]["config"] == model.config.asdict()
    loaded = MoELM.load_from_checkpoint(tmp_path / "model.ckpt").eval()
    assert loaded.config == model.config
    assert loaded.lr == 1e-2
    assert torch.equal(loaded(windows), model.eval()(windows))


def test_logs_what_the_readme_lists(tmp_path: Path) -> None:
    model = MoELM(ModelConfig(**TINY))
    windows = torch.randint(257, (32, 9))
    options = {"logger": CSVLogger(tmp_path), "callbacks": [lm.ExpertLoadMonitor()]}
    trainer = quiet_trainer(tmp_path, max_steps=4, log_every_n_steps=2, val_check_interval=2, **options)
    trainer.fit(model, DataLoader(windows, batch_size=4), DataLoader(windows, batch_size=4))
    expected = {"train/loss", "train/tokens_per_sec", "val/loss", "val/bpb", "val/perplexity", "moe/max_vio/_mean"}
    expected |= {f"moe/max_vio/model.layers.{layer}.mlp" for layer in (1, 2)}
    header = next(iter(tmp_path.rglob("metrics.csv"))).read_text().splitlines()[0]
    assert expected <= set(header.split(","))


@pytest.mark.parametrize("router", ["muon", "adamw"])
def test_muon_gets_matrices_and_adamw_the_rest(router: str) -> None:
    model = MoELM(ModelConfig(**TINY), adamw_lr=0.5, router_optimizer=router)  # type: ignore[arg-type]
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = model.make_optimizer()
    chosen = {names[id(p)]: group["algorithm"] for group in optimizer.param_groups for p in group["params"]}
    assert chosen.keys() == set(names.values())
    for name, parameter in model.named_parameters():
        to_adamw = is_auxiliary(name, parameter) or (name.endswith("gate.weight") and router == "adamw")
        assert chosen[name] == ("adamw" if to_adamw else "muon"), name


def test_adamw_has_its_own_rate_for_embedding_head_and_norms() -> None:
    model = MoELM(ModelConfig(**TINY), optimizer="adamw", lr=1e-3, adamw_lr=8e-3)
    names = {id(p): (name, p) for name, p in model.named_parameters()}
    for group in model.make_optimizer().param_groups:
        assert group["algorithm"] == "adamw"
        for parameter in group["params"]:
            assert group["lr"] == (8e-3 if is_auxiliary(*names[id(parameter)]) else 1e-3)


def test_learning_rate_rises_and_falls_to_a_tenth() -> None:
    factors = [warmup_cosine(step, 100, 0.05) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(factors) == 1
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, abs=1e-3)
    assert warmup_cosine(10_000, 100, 0.05) == pytest.approx(0.1)


def test_fabric_loop_trains_on_one_device(tmp_path: Path) -> None:
    args = "--devices 1 --strategy auto --max-steps 3 --batch-size 4 --accumulate 2 --log-every 1 --val-every 3"
    figures = train_fabric.main([*args.split(), "--out", str(tmp_path / "run")])
    assert 3 < figures["val/loss"] < 6
    assert (tmp_path / "run/last.ckpt").exists()


@pytest.mark.parametrize("command", [["examples/moe_lm/train.py"], ["-m", "examples.moe_lm.demo"]])
def test_scripts_start_from_the_repository_root(command: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout
