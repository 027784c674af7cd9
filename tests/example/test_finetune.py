"""Fine-tuning: the loss is on answers alone, a token weighs the same on every rank, and figures come out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from examples.moe_lm import finetune
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.data import TextDataModule
from examples.moe_lm.finetune import fine_tune
from examples.moe_lm.instruction_model import InstructionLM, response_loss, warmup_linear
from examples.moe_lm.instructions import InstructionBatch, InstructionDataModule
from examples.moe_lm.model import MoELM
from lightning_muon.checkpoint.files import save_file
from tests.example.test_model import TINY
from tests.lightning_runs import PoolEnvironment
from tests.processes import run_processes

pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec:FutureWarning")  # Lightning's own use of torch
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A random model whose biases are not zero."""
    torch.manual_seed(0)
    model = MoELM(ModelConfig(initializer_range=0.1, aux_loss_alpha=1e-2, **TINY), lr=7.0)
    for layer in model.moe_layers.values():
        layer.gate.e_score_correction_bias.normal_(std=0.1)
    return save(model, tmp_path / "model.ckpt")


def save(model: MoELM, path: Path) -> Path:
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    save_file({"pytorch-lightning_version": L.__version__, **content}, path)
    return path


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """Answers of very different lengths."""
    records = [{"prompt": f"say {n}", "response": f"{n % 3} " * (1 + 5 * n % 17)} for n in range(60)]
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def a_batch() -> InstructionBatch:
    windows = torch.randint(257, (3, 9))
    is_target = torch.zeros(3, 8, dtype=torch.bool)
    is_target[0, 5:], is_target[1, 2:4], is_target[2, 7] = True, True, True
    return InstructionBatch(windows, is_target)


def test_the_loss_is_the_targets_and_nothing_else() -> None:
    batch = a_batch()
    logits = torch.randn(3, 8, 257, requires_grad=True)
    part = response_loss(logits, batch)
    by_hand = sum(
        -logits[b, t].log_softmax(-1)[batch.windows[b, t + 1]]
        for b, t in [(0, 5), (0, 6), (0, 7), (1, 2), (1, 3), (2, 7)]
    )
    torch.testing.assert_close(part.nll, by_hand)
    assert int(part.num_targets) == 6
    part.nll.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(-1) > 0, batch.is_target_BT)


def test_what_is_asked_is_no_target_but_is_read(checkpoint: Path) -> None:
    model = InstructionLM.from_file(checkpoint).eval()
    batch = a_batch()
    nll = response_loss(model(batch.windows[:, :-1]), batch).nll
    read = batch.windows.clone()
    read[0, 4] = (read[0, 4] + 1) % 257
    assert response_loss(model(read[:, :-1]), batch._replace(windows=read)).nll != nll
    behind = batch.windows.clone()
    behind[1, 5:] = 0  # behind the last target: padding, say
    assert torch.equal(response_loss(model(behind[:, :-1]), batch._replace(windows=behind)).nll, nll)


def test_a_step_is_adamws_on_the_mean_over_targets(checkpoint: Path, conversations: Path) -> None:
    """Against torch's own loss with ignored targets, and its own optimizer."""
    data = InstructionDataModule([str(conversations)], seq_len=128, batch_size=8)
    batches = list(data.train_dataloader())[:3]
    model = MoELM.load_from_checkpoint(checkpoint)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step, (windows, is_target) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * warmup_linear(step, 3, 0.03)
        targets = windows[:, 1:].masked_fill(~is_target, -100)
        F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    saved = checkpoint.with_name("tuned.ckpt")
    fine_tune(checkpoint, data, optimizer="adamw", lr=1e-3, max_steps=3, save_to=saved, trainer_options=QUIET)
    tuned = MoELM.load_from_checkpoint(saved)
    for (name, ours), theirs in zip(tuned.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def tune(checkpoint: Path, conversations: Path, strategy: str, optimizer: str) -> dict[str, Any]:
    """Weights and figures of four steps of twelve conversations; in each process of a group, or in one."""
    options = {**QUIET, "strategy": strategy, "devices": dist.get_world_size() if dist.is_initialized() else 1}
    if dist.is_initialized():
        options["plugins"] = [PoolEnvironment()]
    saved = conversations.with_name(f"{strategy}-{options['devices']}.ckpt")
    data = InstructionDataModule([str(conversations)], seq_len=128, batch_size=13, val_fraction=0.15)
    assert data.describe()["val"] % 2, "the ranks do not share these equally"
    figures = fine_tune(
        checkpoint, data, optimizer=optimizer, lr=3e-3, max_steps=5, seed=3, save_to=saved, trainer_options=options
    )
    figures["weights"] = torch.load(saved, weights_only=True)["state_dict"]
    return figures


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("strategy", ["muon_zero1", "muon_fsdp"])
def test_two_processes_are_one(checkpoint: Path, conversations: Path, strategy: str, optimizer: str) -> None:
    expected = tune(checkpoint, conversations, "auto", optimizer)
    assert expected["steps"] == 5
    start = torch.load(checkpoint, weights_only=True)["state_dict"]
    results = run_processes(2, tune, checkpoint, conversations, strategy, optimizer)
    for result in results:
        for key in ("val_loss_before", "val_loss"):
            assert result[key] == pytest.approx(expected[key], rel=1e-5)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, atol=1e-5, rtol=1e-5)
            if name.endswith("bias"):
                assert torch.equal(weight, start[name]), "the experts' balance is left alone"
            else:
                assert not torch.equal(weight, start[name]), name


def test_validation_is_the_mean_over_targets(checkpoint: Path, conversations: Path) -> None:
    data = InstructionDataModule([str(conversations)], seq_len=128, batch_size=4, val_fraction=0.2)
    figures = fine_tune(checkpoint, data, max_steps=1, trainer_options=QUIET)
    model, sums = MoELM.load_from_checkpoint(checkpoint).eval(), torch.zeros(2)
    for example in data.val_set:  # one at a time: no padding
        with torch.no_grad():
            nll = F.cross_entropy(model(example.ids_T[None, :-1])[0], example.ids_T[1:], reduction="none")
        sums += torch.tensor([nll[example.is_target_T[1:]].sum(), example.is_target_T.sum()])
    assert figures["val_loss_before"] == pytest.approx(float(sums[0] / sums[1]), rel=1e-5)
    assert figures["conversations_val_targets"] == int(sums[1])


def test_figures_for_an_experiment(checkpoint: Path, conversations: Path, tmp_path: Path) -> None:
    data = InstructionDataModule([str(conversations)], seq_len=128, batch_size=8)
    (tmp_path / "text").mkdir()
    for number in range(4):
        (tmp_path / "text" / f"{number}.txt").write_text("to be or not " * 20)
    text = TextDataModule([str(tmp_path / "text")], seq_len=16, batch_size=4, val_windows=8, val_fraction=0.3)
    before = {name: tensor.clone() for name, tensor in torch.load(checkpoint)["state_dict"].items()}
    runs = [
        fine_tune(checkpoint, data, optimizer=o, lr=3e-3, adamw_lr=1e-3, epochs=3, seed=seed, text=text,
                  trainer_options=QUIET)
        for o, seed in (("muon", 0), ("muon", 0), ("muon", 1), ("adamw", 0))
    ]  # fmt: skip
    first, again, other_order, adamw = ({**run, "seconds": 0} for run in runs)
    assert first == again
    assert first["steps"] == 3 * (len(data.train_set) // 8)
    assert (first["optimizer"], first["lr"], first["adamw_lr"]) == ("muon", 3e-3, 1e-3)
    assert first["val_loss"] < 0.9 * first["val_loss_before"]
    assert first["val_loss_before"] == other_order["val_loss_before"] == adamw["val_loss_before"]
    assert len({run["val_loss"] for run in (first, other_order, adamw)}) == 3
    model = MoELM.load_from_checkpoint(checkpoint)
    assert first["text_bpb_before"] == pytest.approx(text_bits(model, text), rel=1e-5)
    assert first["text_bpb"] != first["text_bpb_before"]
    assert all(torch.equal(t, before[n]) for n, t in torch.load(checkpoint)["state_dict"].items())  # not written to


def text_bits(model: MoELM, text: TextDataModule) -> float:
    windows = torch.cat(list(text.val_dataloader()))
    with torch.no_grad():
        logits: Tensor = model.eval()(windows[:, :-1])
    return float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())) / math.log(2)


def test_the_rate_rises_and_falls_to_nothing() -> None:
    factors = [warmup_linear(step, 100, 0.03) for step in range(101)]
    assert factors[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert factors[3:] == pytest.approx([(100 - step) / 97 for step in range(3, 101)])
    assert warmup_linear(1000, 100, 0.03) == 0
    assert warmup_linear(0, 1, 0.03) == 1


def test_tokens_that_the_checkpoint_does_not_know_are_refused(tmp_path: Path, conversations: Path) -> None:
    data = InstructionDataModule([str(conversations)], seq_len=128, batch_size=8)
    for size in (200, 1000):
        save(MoELM(ModelConfig(vocab_size=size, **TINY)), tmp_path / "other.ckpt")
        with pytest.raises(ValueError, match=rf"knows {size} tokens, and without a tokenizer a token is a byte"):
            fine_tune(tmp_path / "other.ckpt", data, trainer_options=QUIET)
    data.tokenizer = "a folder"  # whose 257 tokens are read already
    save(MoELM(ModelConfig(vocab_size=200, **TINY)), tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="knows 200 tokens, and the conversations have 257"):
        fine_tune(tmp_path / "other.ckpt", data, trainer_options=QUIET)


def test_another_checkpoint_is_refused(tmp_path: Path, conversations: Path) -> None:
    save_file({"state_dict": {}, "other": 1}, tmp_path / "other.ckpt")
    data = InstructionDataModule([str(conversations)], seq_len=128, batch_size=8)
    with pytest.raises(ValueError, match="is no checkpoint of MoELM: it has state_dict, other"):
        fine_tune(tmp_path / "other.ckpt", data, trainer_options=QUIET)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_command(checkpoint: Path, conversations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(checkpoint), "--data", str(conversations), "--seq-len", "128", "--batch-size", "8"]
    command += ["--max-steps", "10", "--lr", "3e-3", "--strategy", "auto", "--accelerator", "cpu"]
    command += ["--accumulate", "2", "--activation-checkpointing"]
    figures = finetune.main([*command, "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "figures.json")])
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    saved = tmp_path / "runs/version_0/last.ckpt"
    assert f"weights: {saved}" in capsys.readouterr().out
    loaded = MoELM.load_from_checkpoint(saved)
    assert loaded.config == MoELM.load_from_checkpoint(checkpoint).config
    assert list((tmp_path / "runs/version_0").glob("events*"))
