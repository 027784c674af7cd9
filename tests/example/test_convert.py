"""Hugging Face checkpoints in and out: what transformers computes with the same weights, and bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_muon as lm
from examples.moe_lm import convert
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.hugging_face.configuration import from_hugging_face
from examples.moe_lm.hugging_face.convert import empty_model, from_hf, to_hf
from examples.moe_lm.hugging_face.keys import check_keys, parts_of
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
    published_keys,
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


def test_moonlights_configuration_and_every_key_of_it(tmp_path: Path) -> None:
    config = from_hugging_face(MOONLIGHT)
    total, active = config.num_parameters(embeddings=False)
    assert (total, active) == (15_289_019_904, 2_243_685_888)  # 15.289 and, without norms and biases, 2.2436 billion
    assert (config.q_lora_rank, config.max_seq_len, config.rope_theta) == (None, 8192, 50_000.0)
    model = empty_model(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters().total

    published = published_keys(config)
    assert len(published) == 3 + 27 * 7 + 3 + 26 * (64 * 3 + 3 + 2)
    parts = [
        part
        for name, tensor in model.state_dict().items()
        for part in parts_of(name, tuple(tensor.shape), published.keys())
    ]
    used = [part.key for part in parts]
    assert sorted(used) == sorted(published)  # each once
    check_keys(parts, published, ())


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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "deepseek_v2"}, "model_type='deepseek_v2'"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"rope_scaling": {"type": "yarn", "factor": 40}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type 'yarn'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config .fp8.: convert"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4"),
        ({"seq_aux": False}, "seq_aux"),
        ({"hidden_size": None}, "hidden_size=None"),
        ({"n_group": 3}, "n_group=3 must divide"),
        ({"rope_theta": None}, "rope_theta=None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_model_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_hugging_face({**MOONLIGHT, **change})


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError, match=r"hidden_act.*; .*vocab_size=None.*; q_lora_rank is missing"):
        from_hugging_face({k: v for k, v in (MOONLIGHT | {"hidden_act": "gelu"}).items() if k[:2] not in ("vo", "q_")})


def break_folder(folder: Path, how: str) -> None:
    from safetensors.torch import load_file, save_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(first)
    norm = "model.norm.weight"
    holder = folder / index["weight_map"][norm]
    if how == "absent file":
        first.unlink()
    elif how == "torn file":
        first.write_bytes(first.read_bytes()[:-100])
    elif how == "key of the index nowhere":
        index["weight_map"]["nothing"] = first.name
    elif how == "key twice":
        save_file(tensors | {norm: load_file(holder)[norm]}, first)
    elif how == "both forms":
        fused = {"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(8, 32, 32)}
        index["weight_map"] |= dict.fromkeys(fused, first.name)
        save_file(tensors | fused, first)
    elif how == "missing":
        save_file({k: v for k, v in load_file(holder).items() if k != norm} | {"other": torch.zeros(1)}, holder)
        del index["weight_map"][norm]
        index["weight_map"]["other"] = holder.name
    elif how == "shape":
        save_file(load_file(holder) | {norm: torch.zeros(33)}, holder)
    elif how == "float8":
        save_file(load_file(holder) | {norm: torch.zeros(32).to(torch.float8_e4m3fn)}, holder)
    elif how == "scale":
        save_file(load_file(holder) | {f"{norm}_scale_inv": torch.zeros(1)}, holder)
        index["weight_map"][f"{norm}_scale_inv"] = holder.name
    elif how == "outside":
        shutil.move(first, folder.parent / first.name)
        index["weight_map"] = {k: f"../{first.name}" if v == first.name else v for k, v in index["weight_map"].items()}
    elif how == "no index":
        (folder / "model.safetensors.index.json").unlink()
        return
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("absent file", r"lacks 1 of its \d+ files of weights: model-00001-of-\d+.safetensors. Download"),
        ("torn file", r"model-00001-of-\d+.safetensors is cut off"),
        ("key of the index nowhere", "do not agree .*: nothing"),
        ("key twice", r"do not agree .*: .*model\.norm\.weight"),
        ("both forms", r"16 unexpected: model.layers.1.mlp.experts.0.gate_proj.weight, .* and 8 more"),
        ("missing", r"1 missing: model.norm.weight; 1 unexpected: other"),
        ("shape", r"1 of another shape: model.norm.weight is \(33,\), expected \(32,\)"),
        ("float8", r"model.norm.weight \(F8_E4M3\)"),
        ("scale", "weight_scale_inv belongs to 8-bit weights"),
        ("outside", "names files outside the folder"),
        ("no index", "neither model.safetensors nor"),
    ],
)
def test_a_folder_that_is_not_right_is_one_error_and_nothing_is_written(
    tmp_path: Path, how: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "hf", max_shard_size="20KB")
    break_folder(tmp_path / "hf", how)
    target = tmp_path / "out/model.ckpt"
    with pytest.raises(ValueError, match=said):
        from_hf(tmp_path / "hf", target)
    assert not target.parent.exists()
    capsys.readouterr()  # transformers' progress bars
    assert convert.main(["from-hf", str(tmp_path / "hf"), str(target)]) == 1
    assert capsys.readouterr().err.startswith("convert.py: ")


def test_an_old_checkpoint_survives_a_failing_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    target = tmp_path / "out/model.ckpt"
    target.write_text("the old one")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="intact"):
        from_hf(tmp_path / "hf", target)
    assert [path.name for path in target.parent.iterdir()] == ["model.ckpt"]
    assert target.read_text() == "the old one"


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="choose another name"):
        to_hf(tmp_path / "model.ckpt", tmp_path / "hf")
    with pytest.raises(lm.CheckpointError, match="There is no such checkpoint"):
        to_hf(tmp_path / "nothing.ckpt", tmp_path / "new")
    with pytest.raises(ValueError, match="folder of shards"):
        to_hf(tmp_path / "hf", tmp_path / "new")
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    content["hyper_parameters"]["config"]["attention"] = "gqa"
    save(content, tmp_path / "gqa.ckpt")
    with pytest.raises(ValueError, match="q_proj"):
        to_hf(tmp_path / "gqa.ckpt", tmp_path / "new")
    model = MoELM(ModelConfig(attention="gqa", hidden_size=32, num_hidden_layers=2))
    save({"hyper_parameters": dict(model.hparams), "state_dict": model.state_dict()}, tmp_path / "gqa.ckpt")
    with pytest.raises(ValueError, match="attention='gqa'"):
        to_hf(tmp_path / "gqa.ckpt", tmp_path / "new")
    save({"weights": 1}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of MoELM"):
        to_hf(tmp_path / "other.ckpt", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def save(content: Any, path: Path) -> None:
    torch.save(content, path)


@pytest.mark.parametrize("text", ["0", "5 pounds", "-1GB", "GB"])
def test_sizes_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convert.main(["to-hf", "a", "b", f"--max-shard-size={text}"])
    assert "is no size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert.main(["to-hf", "a", "b", "--copy-code"])
    assert "--like" in capsys.readouterr().err


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
