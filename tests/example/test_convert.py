"""Hugging Face checkpoints in and out: what transformers computes with the same weights, and bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from examples.moe_lm import convert
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.hugging_face.configuration import from_hugging_face
from examples.moe_lm.hugging_face.convert import from_hf, to_hf
from examples.moe_lm.model import MoELM, next_token_nll
from lightning_muon.checkpoint.files import verify_file

transformers = pytest.importorskip("transformers")
pytestmark = [
    # Lightning's own use of torch, and a validation that is left out here
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]

from tests.example.deepseek import (  # noqa: E402 (needs safetensors, which transformers brings)
    COMPRESSED,
    GROUPED,
    MOONLIGHT,
    config_of,
    make,
    tensors_of,
)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """The same names, dtypes and bits."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def ours_to_theirs(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """Our tensors under a name that transformers has in memory."""
    if name.endswith("experts.gate_up_proj"):
        base = name.removesuffix("gate_up_proj")
        return torch.cat((tensors[base + "gate_proj"], tensors[base + "up_proj"]), dim=1)
    return tensors[name]


@pytest.mark.parametrize("fused", [False, True], ids=["per_expert", "fused"])
@pytest.mark.parametrize("changes", [{}, COMPRESSED, GROUPED, {**COMPRESSED, **GROUPED}], ids=str)
def test_logits_and_gradients_are_deepseek_v3s(tmp_path: Path, changes: dict[str, Any], fused: bool) -> None:
    theirs = make(tmp_path / "hf", fused=fused, **changes)
    assert any("experts.gate_up_proj" in key for key in tensors_of(tmp_path / "hf")) == fused
    assert convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "model.ckpt")]) == 0
    ours = MoELM.load_from_checkpoint(tmp_path / "model.ckpt").eval()

    ids = torch.randint(67, (3, 24))
    logits, expected = ours(ids[:, :-1]), theirs(ids[:, :-1]).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    next_token_nll(logits, ids[:, 1:]).mean().backward()
    next_token_nll(expected, ids[:, 1:]).mean().backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        difference = (ours_to_theirs(name, gradients) - parameter.grad).norm() / parameter.grad.norm()
        assert difference <= 1e-4, name


@pytest.mark.parametrize("changes", [{}, COMPRESSED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back_is_bitwise(tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    make(tmp_path / "hf", dtype, **changes)
    from_hf(tmp_path / "hf", tmp_path / "model.ckpt")
    to_hf(tmp_path / "model.ckpt", tmp_path / "back", like=tmp_path / "hf")
    assert equal(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "hf"))
    assert (tmp_path / "back/config.json").read_bytes() == (tmp_path / "hf/config.json").read_bytes()

    source, back = (
        transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager").eval()
        for name in ("hf", "back")
    )
    ids = torch.randint(67, (2, 16))
    assert back.dtype == dtype
    assert torch.equal(back(ids).logits, source(ids).logits)


def test_without_a_folder_to_resemble_transformers_loads_it_too(tmp_path: Path) -> None:
    model = make(tmp_path / "hf", **COMPRESSED, **GROUPED)
    from_hf(tmp_path / "hf", tmp_path / "model.ckpt")
    to_hf(tmp_path / "model.ckpt", tmp_path / "back")
    assert set(MOONLIGHT) - set(config_of(tmp_path / "back")) == {"auto_map", "pretraining_tp", "transformers_version"}
    assert from_hugging_face(config_of(tmp_path / "back")) == from_hugging_face(config_of(tmp_path / "hf"))
    loaded, information = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager", output_loading_info=True
    )
    assert not any(information.values()), information
    ids = torch.randint(67, (2, 16))
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": 12, "bias_update_rate": 0.0, "aux_loss_alpha": 1e-3}], ids=str)
def test_from_a_trained_checkpoint_and_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = ModelConfig(
        **{"hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 16, "max_seq_len": 16, **changes}
    )
    trainer = train(MoELM(config, lr=1e-2), tmp_path)
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    to_hf(tmp_path / "trained.ckpt", tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "back.ckpt")
    before = torch.load(tmp_path / "trained.ckpt", weights_only=True)
    after = torch.load(tmp_path / "back.ckpt", weights_only=True)
    assert equal(after["state_dict"], before["state_dict"])
    assert after["hyper_parameters"]["config"] == before["hyper_parameters"]["config"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    ids = torch.randint(257, (2, 16))
    torch.testing.assert_close(trainer.lightning_module.eval()(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


def train(model: MoELM, folder: Path, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "max_steps": 2}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(default_root_dir=folder, **{**defaults, **quiet, **options})
    trainer.fit(model, DataLoader(torch.randint(67, (8, 13)), batch_size=4))
    return trainer


def test_training_goes_on_from_it(tmp_path: Path) -> None:
    make(tmp_path / "hf", torch.bfloat16)
    from_hf(tmp_path / "hf", tmp_path / "model.ckpt")
    verify_file(tmp_path / "model.ckpt")
    model = MoELM.load_from_checkpoint(tmp_path / "model.ckpt", lr=1e-4, optimizer="muon")
    assert model.lr == 1e-4
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = train(model, tmp_path)
    assert trainer.global_step == 2
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])]
    assert set(dict(model.named_parameters())) <= set(moved)
    windows = DataLoader(torch.randint(67, (8, 13)), batch_size=4)
    expected = trainer.validate(
        MoELM.load_from_checkpoint(tmp_path / "model.ckpt"), windows, verbose=False
    )  # the Trainer reads the file itself, too
    assert trainer.validate(model, windows, ckpt_path=tmp_path / "model.ckpt", verbose=False) == expected


def test_bits_are_kept_unless_asked(tmp_path: Path) -> None:
    make(tmp_path / "hf", torch.bfloat16)
    source = tensors_of(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "kept.ckpt")
    kept = torch.load(tmp_path / "kept.ckpt", weights_only=True)["state_dict"]
    for name, tensor in kept.items():
        assert tensor.dtype == (torch.float32 if name.endswith("bias") else torch.bfloat16), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name  # no larger tensor lies behind it
    experts = "model.layers.1.mlp.experts"
    for projection in ("gate_proj", "up_proj", "down_proj"):
        stack = torch.stack([source[f"{experts}.{e}.{projection}.weight"] for e in range(8)])
        assert torch.equal(kept[f"{experts}.{projection}"], stack)

    assert convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "wide.ckpt"), "--dtype", "float32"]) == 0
    wide = torch.load(tmp_path / "wide.ckpt", weights_only=True)["state_dict"]
    assert equal(wide, {name: tensor.float() for name, tensor in kept.items()})
    to_hf(tmp_path / "wide.ckpt", tmp_path / "narrow", torch.bfloat16)
    assert equal(tensors_of(tmp_path / "narrow"), source)
    assert config_of(tmp_path / "narrow")["torch_dtype"] == "bfloat16"


def test_a_bias_in_bfloat16_becomes_float32(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, tmp_path / "hf/model.safetensors")
    from_hf(tmp_path / "hf", tmp_path / "model.ckpt")
    kept = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"][name]
    assert torch.equal(kept, tensors[name].float())


def test_a_stack_of_several_dtypes_needs_a_choice(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file(tensors | {name: tensors[name].bfloat16()}, tmp_path / "hf/model.safetensors")
    with pytest.raises(ValueError, match=r"experts.0.up_proj.* torch.bfloat16, torch.float32"):
        from_hf(tmp_path / "hf", tmp_path / "out/model.ckpt")
    assert not (tmp_path / "out").exists()
    from_hf(tmp_path / "hf", tmp_path / "out/model.ckpt", torch.float32)


def test_shards_in_and_out(tmp_path: Path) -> None:
    model = make(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    from_hf(tmp_path / "hf", tmp_path / "model.ckpt")
    command = ["to-hf", str(tmp_path / "model.ckpt"), str(tmp_path / "back"), "--max-shard-size", "20KB"]
    assert convert.main(command) == 0
    shards = sorted((tmp_path / "back").glob("*.safetensors"))
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert all(path.name == f"model-{n:05}-of-{len(shards):05}.safetensors" for n, path in enumerate(shards, 1))
    assert max(path.stat().st_size for path in shards) < 25_000  # with their headers
    assert len({path.stat().st_mode for path in (tmp_path / "back").iterdir()}) == 1
    tensors = tensors_of(tmp_path / "back")
    assert equal(tensors, tensors_of(tmp_path / "hf"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    ids = torch.randint(67, (2, 16))
    assert torch.equal(back(ids).logits, model(ids).logits)


def test_other_files_come_along_and_code_only_when_asked(tmp_path: Path) -> None:
    make(tmp_path / "hf")
    config = {**config_of(tmp_path / "hf"), "auto_map": {"AutoConfig": "configuration_x.X"}, "bos_token_id": 7}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "LICENSE", "tokenization_x.py", "pytorch_model.bin", ".hidden"):
        (tmp_path / "hf" / name).write_text(name)
    (tmp_path / "hf/link.txt").symlink_to(tmp_path / "hf/LICENSE")
    from_hf(tmp_path / "hf", tmp_path / "model.ckpt")
    done = to_hf(tmp_path / "model.ckpt", tmp_path / "plain", like=tmp_path / "hf")
    expected = {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "LICENSE", "link.txt"}
    assert {path.name for path in (tmp_path / "plain").iterdir()} == expected
    assert not (tmp_path / "plain/link.txt").is_symlink()
    assert done.code == ["tokenization_x.py"]
    assert config_of(tmp_path / "plain") == {key: value for key, value in config.items() if key != "auto_map"}
    to_hf(tmp_path / "model.ckpt", tmp_path / "all", like=tmp_path / "hf", copy_code=True)
    assert {path.name for path in (tmp_path / "all").iterdir()} == expected | {"tokenization_x.py"}
    assert config_of(tmp_path / "all") == config


def test_what_training_changed_is_changed_in_the_configuration(tmp_path: Path) -> None:
    make(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "model.ckpt")
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    content["hyper_parameters"]["config"].update(rope_theta=1e6, max_seq_len=128, aux_loss_alpha=1e-4)
    torch.save(content, tmp_path / "changed.ckpt")
    to_hf(tmp_path / "changed.ckpt", tmp_path / "back", torch.bfloat16, like=tmp_path / "hf")
    expected = config_of(tmp_path / "hf") | {"rope_theta": 1e6, "max_position_embeddings": 128, "dtype": "bfloat16"}
    del expected["rope_parameters"]
    assert config_of(tmp_path / "back") == expected | {"aux_loss_alpha": 1e-4}
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "back")
    assert loaded.rope_parameters["rope_theta"] == 1e6


def test_layers_that_predict_further_tokens_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    make(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    plain = dict(tensors)
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(32, 64)
    tensors["model.layers.3.enorm.weight"] = torch.zeros(32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    save_file(tensors, tmp_path / "hf/model.safetensors")
    config = config_of(tmp_path / "hf") | {"num_nextn_predict_layers": 1}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    assert convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "model.ckpt")]) == 0
    assert "left out: 2 tensors" in capsys.readouterr().out
    to_hf(tmp_path / "model.ckpt", tmp_path / "back", like=tmp_path / "hf")
    assert equal(tensors_of(tmp_path / "back"), plain)
    assert config_of(tmp_path / "back")["num_nextn_predict_layers"] == 0


def test_the_command_runs_as_a_file(tmp_path: Path) -> None:
    import subprocess
    import sys

    make(tmp_path / "hf")
    script = Path(__file__).parents[2] / "examples/moe_lm/convert.py"
    command = [sys.executable, str(script), "from-hf", str(tmp_path / "hf"), str(tmp_path / "model.ckpt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    config = from_hugging_face(config_of(tmp_path / "hf"))
    count = config.num_parameters()
    shown = f"{tmp_path / 'model.ckpt'}: {count.total:,} parameters, {count.active:,} active, float32\n"
    assert done.stdout == shown
