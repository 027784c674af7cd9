"""Models of `transformers`: which matrices they are made of, that they train sharded, and that they can be saved."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_muon as lm
from lightning_muon.cli import main as cli
from tests.processes import run_processes

transformers = pytest.importorskip("transformers")

from examples.hugging_face.train import CausalLM, load_model, main  # noqa: E402
from tests.example.hugging_face_models import CONFIGS, tiny  # noqa: E402
from tests.example.hugging_face_unfused import UNFUSED, unfuse  # noqa: E402
from tests.lightning_runs import PoolEnvironment  # noqa: E402

FUSED_ATTENTION = {
    "gpt2": "c_attn",
    "gpt_bigcode": "c_attn",
    "gpt_bigcode_multi_query": "c_attn",
    "codegen": "qkv_proj",
    "phi3": "qkv_proj",
    "gpt_neox": "query_key_value",
    "persimmon": "query_key_value",
    "bloom": "query_key_value",
    "falcon": "query_key_value",
    "falcon_heads": "query_key_value",
    "falcon_groups": "query_key_value",
    "qwen3_next": "q_proj",
}
TRAINED = ["llama_tied", "qwen3_moe", "gpt2", "deepseek_v3", "mixtral", "phi3", "gpt_neox", "gpt_oss", "falcon_groups"]


# ------------------------------------------------------------------ what is fused how


def seen_by_attention(model: Any, projection: str) -> list[list[int]]:
    """Which output features of a projection the first attention takes for queries, keys and values: each feature is
    replaced by its number, at position 0, where rotary embeddings turn nothing."""
    seen: list[tuple[Tensor, ...]] = []

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        seen.append((query, key, value))
        return torch.zeros_like(query).transpose(1, 2).contiguous(), None

    owner = next(module for module in model.modules() if isinstance(getattr(module, projection, None), nn.Module))
    layer = getattr(owner, projection)
    layer.register_forward_hook(lambda _, __, out: torch.arange(out.shape[-1]).to(out).expand_as(out))
    own = next((name for name in ("_attn", "_split_heads", "_reshape") if hasattr(owner, name)), None)
    if own == "_attn":
        attend = owner._attn
        owner._attn = lambda query, key, value, *rest: (
            seen.append((query, key, value)) or attend(query, key, value, *rest)
        )
    elif own is not None:
        split = getattr(owner, own)
        setattr(owner, own, lambda fused: seen.append(split(fused)) or split(fused))
    else:
        transformers.AttentionInterface.register("record", record)
        model.config._attn_implementation = "record"
    if hasattr(owner, "q_norm"):
        owner.q_norm = nn.Identity()
    with torch.no_grad():
        model.eval()(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    return [sorted(set(part.flatten().long().tolist())) for part in seen[0]]


@pytest.mark.parametrize("name", FUSED_ATTENTION)
def test_attention_sees_what_is_taken_apart(name: str) -> None:
    """The slices that the other tests rely on are those of the model's own code."""
    model, projection = tiny(name), FUSED_ATTENTION[name]
    path, weight = next((n, p) for n, p in model.named_parameters() if n.endswith(f"{projection}.weight"))
    transposed = type(model.get_submodule(path.removesuffix(".weight"))).__name__ == "Conv1D"
    features = weight.shape[1 if transposed else 0]
    numbers = torch.arange(features).float()[:, None].expand(features, weight.numel() // features)
    apart = [sorted(part[:, 0].long().tolist()) for part in unfuse(name, path, numbers.T if transposed else numbers)]
    seen = seen_by_attention(model, projection)
    if name == "qwen3_next":
        assert apart == [seen[0], sorted(set(range(features)) - set(seen[0]))]
    elif name == "codegen":
        assert apart == [seen[0], seen[2], seen[1]]
    else:
        assert apart == seen


def test_the_delta_net_sees_what_is_taken_apart() -> None:
    model = tiny("qwen3_next")
    net = model.model.layers[0].linear_attn
    qkvz, ba = torch.arange(64.0), torch.arange(8.0)
    q, k, v, z, b, a = net.fix_query_key_value_ordering(qkvz[None, None], ba[None, None])
    for parts, name, count in (((q, k, v, z), "in_proj_qkvz", 64), ((b, a), "in_proj_ba", 8)):
        apart = unfuse("qwen3_next", name, torch.arange(float(count))[:, None])
        assert [sorted(p.flatten().tolist()) for p in parts] == [sorted(p.flatten().tolist()) for p in apart]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text"])
def test_experts_do_nothing_without_their_gates(name: str) -> None:
    """Of gate and up, which is which: with the gates at zero an expert returns nothing."""
    model = tiny(name)
    path, weight = next((n, p) for n, p in model.named_parameters() if n.endswith("experts.gate_up_proj"))
    experts = model.get_submodule(path.rpartition(".")[0])
    hidden = torch.randn(6, weight.shape[1] if name in ("gpt_oss", "llama4_text") else weight.shape[2])
    if name == "llama4_text":
        arguments: tuple[Tensor, ...] = (hidden.repeat(len(weight), 1),)
    else:
        arguments = (hidden, torch.arange(6)[:, None] % len(weight), torch.ones(6, 1))
    with torch.no_grad():
        for bias in ("gate_up_proj_bias", "down_proj_bias"):
            if hasattr(experts, bias):
                getattr(experts, bias).zero_()
        assert experts(*arguments).abs().min() > 0
        numbers = torch.arange(weight.numel()).view_as(weight)
        gates = torch.cat([part.flatten() for part in unfuse(name, path, numbers)[::2]])
        weight.view(-1)[gates] = 0
        assert not experts(*arguments).any()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_is_that_of_the_model_unfused(name: str) -> None:
    """Every parameter is read as the matrices that the model computes with, and one step trains them as if they were
    parameters of their own. The "spectral" scale tells rows from columns."""
    model, options = tiny(name), {"lr": 0.05, "scale": "spectral", "weight_decay": 0.1}
    ids = torch.randint(257, (2, 9))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer = lm.Muon(model, **options)
    apart = nn.ParameterDict()
    for path, param in model.named_parameters():
        if optimizer.routes[path].algorithm == "muon":
            matrices = zip(unfuse(name, path, param.detach()), unfuse(name, path, param.grad), strict=True)
            for number, (weight, gradient) in enumerate(matrices):
                key = f"{path}.{number}".replace(".", "/")
                apart[key] = weight.clone()
                apart[key].grad = gradient.clone()
    theirs = lm.Muon(apart, rules=[lm.Rule("")], **options)
    optimizer.step()
    theirs.step()
    for path, param in model.named_parameters():
        if optimizer.routes[path].algorithm == "muon":
            found = unfuse(name, path, param.detach())
            assert optimizer.routes[path].layout.num_matrices == len(found), path
            for number, weight in enumerate(found):
                expected = apart[f"{path}.{number}".replace(".", "/")].detach()
                torch.testing.assert_close(weight, expected, rtol=0, atol=1e-5, msg=lambda m, p=path: f"{p}: {m}")


@pytest.mark.parametrize("name", CONFIGS)
def test_adamw_has_embeddings_heads_and_vectors(name: str) -> None:
    model = tiny(name)
    routes = lm.Muon(model).routes
    by_adamw = {path for path, decision in routes.items() if decision.algorithm == "adamw"}
    expected = {
        path
        for path, param in model.named_parameters()
        if param.ndim < 2
        or param.numel() == max(param.shape)  # Qwen's gate of the shared expert: one row
        or re.search(r"embed|wte|wpe|lm_head\.weight|_bias$|conv_?1d|A_log", path)
    }
    assert by_adamw == expected
    assert any(re.search(r"\.(gate|router)\.(?!proj)", path) for path in routes) == ("experts" in " ".join(routes))


def test_the_oracle_is_about_models_that_there_are() -> None:
    assert set(UNFUSED) <= set(CONFIGS)


# ------------------------------------------------------------------ training


class Recorded(CausalLM):
    """Every step has the same batch, and every process takes its share."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, warmup=1, **options)
        generator = torch.Generator().manual_seed(5)
        self.windows = torch.randint(257, (4, 13), generator=generator)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        own = self.windows.chunk(self.trainer.world_size)[self.global_rank]
        loss = super().training_step(own, batch_idx)
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        return loss

    def train_dataloader(self) -> Any:
        return DataLoader(range(100))


def trained(name: str, strategy: str, folder: str, optimizer: str = "muon") -> tuple[list[float], Tensor]:
    """Losses of four steps, and logits after them; the model is saved to the folder."""
    module = Recorded(tiny(name), optimizer=optimizer, lr=1e-2)
    alone = strategy == "auto"
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1 if alone else 2,
        plugins=None if alone else [PoolEnvironment()],
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    module.save_pretrained(Path(folder))
    with torch.no_grad():
        logits: Tensor = module.eval()(module.windows)
    return module.losses, logits


@pytest.mark.parametrize("strategy", ["muon_zero1", "muon_fsdp"])
@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_train_as_one_and_save_what_transformers_loads(name: str, strategy: str, tmp_path: Path) -> None:
    losses, logits = trained(name, "auto", str(tmp_path / "one"))
    assert losses[-1] < losses[0]
    results = run_processes(2, trained, name, strategy, str(tmp_path / "two"))
    for found, _ in results:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=0, atol=1e-5)
    torch.testing.assert_close(results[0][1], logits, rtol=0, atol=1e-4)
    for folder, expected in (("one", logits), ("two", results[0][1])):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32).eval()
        with torch.no_grad():
            found = loaded(Recorded(None).windows, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------ the command, and the plan


def write_model(folder: Path, name: str, vocab_size: int = 257) -> None:
    """A folder with a configuration, as one finds them."""
    config = tiny(name).config
    config.vocab_size = vocab_size
    config.save_pretrained(folder)


def write_text(folder: Path) -> None:
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"Number {number} is followed by {number + 1}.\n" * 40)


def command(*args: object) -> str:
    """Standard output of the example, run as a file."""
    found = subprocess.run(
        [sys.executable, "examples/hugging_face/train.py", "--accelerator", "cpu", *map(str, args)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=140,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_the_command_trains_on_two_processes_with_the_folders_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model, text, out = tmp_path / "model", tmp_path / "text", tmp_path / "out"
    text.mkdir()
    write_text(text)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    bpe.train([str(file) for file in text.iterdir()], tokenizers.trainers.BpeTrainer(vocab_size=90))
    write_model(model, "qwen3_moe", bpe.get_vocab_size())
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(model)
    shown = command(
        *("--model", model, "--files", text, "--save", out, "--strategy", "muon_fsdp", "--devices", 2),
        *("--max-steps", 3, "--batch-size", 4, "--seq-len", 16),
    )
    assert shown.count("experts' fused gate, up") == 2, "the table, once, has both layers"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(loaded).__name__ == loaded.config.architectures[0] == "Qwen3MoeForCausalLM"
    assert len(transformers.AutoTokenizer.from_pretrained(out)) == bpe.get_vocab_size()
    again = command("--model", out, "--files", text, "--optimizer", "adamw", "--max-steps", 1, "--seq-len", 16)
    assert "muon 0 (0.0%)" in again


def test_weights_of_a_folder_are_loaded_to_be_trained(tmp_path: Path) -> None:
    write_model(tmp_path, "llama", 257)
    saved = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    saved.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert all(module.training for module in loaded.modules())
    for name, weight in saved.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight), name
    fresh = load_model(tmp_path / "config.json")
    assert fresh.training
    assert not torch.equal(fresh.lm_head.weight, saved.lm_head.weight)


@pytest.mark.parametrize(
    ("prepare", "arguments", "said"),
    [
        (lambda folder: (folder / "pytorch_model.bin").touch(), [], r"not as \*.safetensors: pytorch_model.bin"),
        (lambda folder: (folder / "merges.txt").write_text("#version: 0.2"), [], "."),
        (lambda folder: None, ["--seq-len", "4096"], "--seq-len 4096 is more than the model's"),
        (lambda folder: (folder / "config.json").unlink(), [], "."),
    ],
    ids=["other weights", "part of a tokenizer", "too long", "no config"],
)
def test_what_cannot_be_trained_is_refused_before_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Any, arguments: list[str], said: str
) -> None:
    write_model(tmp_path, "llama", 257)
    prepare(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(tmp_path), *arguments])
    assert stopped.value.code == 2
    assert re.search(said, capsys.readouterr().err.split("error:")[1])


def test_a_place_that_cannot_be_saved_to_is_found_before_training(tmp_path: Path) -> None:
    write_model(tmp_path, "llama", 257)
    (tmp_path / "taken").touch()
    with pytest.raises(FileExistsError):
        main(["--model", str(tmp_path), "--save", str(tmp_path / "taken")])
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path / "nowhere")])


def test_adamw_for_everything_is_read_as_the_same_matrices() -> None:
    modules = [CausalLM(tiny("gpt_neox"), optimizer=one) for one in ("muon", "adamw")]
    layouts = []
    for module in modules:
        module.trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_steps=3)
        optimizer = module.configure_optimizers()["optimizer"]
        layouts.append({name: decision.layout for name, decision in optimizer.routes.items()})
    assert {decision.algorithm for decision in optimizer.routes.values()} == {"adamw"}
    fused = [name for name in layouts[0] if "query_key_value.weight" in name]
    assert fused
    assert all(layouts[0][name] == layouts[1][name] for name in fused)


def test_a_model_with_too_few_tokens_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path, "llama", 256)
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path), "--seq-len", "16"])
    assert "set vocab_size to 257" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpt_oss", "falcon_groups", "mixtral"])
def test_a_plan_needs_no_rules(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path, name)
    assert cli(["plan", "--world-size", "2", "--hf", str(tmp_path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    routes = lm.Muon(tiny(name)).routes
    expected = sum(r.layout.num_matrices for r in routes.values() if r.algorithm == "muon" and r.layout)
    found = [rank["matrices"] for rank in plan["schemes"]["muon_zero1"]["ranks"]]
    assert sum(count for rank in found for count in rank.values()) == expected
