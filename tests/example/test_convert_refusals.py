"""Folders and checkpoints that cannot be converted: one clear error, and nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_muon as lm
from examples.moe_lm import convert
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.hugging_face import writing
from examples.moe_lm.hugging_face.configuration import from_hugging_face
from examples.moe_lm.hugging_face.convert import from_hf, to_hf
from examples.moe_lm.model import MoELM

pytest.importorskip("transformers")

from tests.example.deepseek import MOONLIGHT, make


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
        ({"rope_interleave": False}, "rope_interleave=False"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1"),
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
    elif how == "other file":
        index["weight_map"][norm] = next(name for name in index["weight_map"].values() if name != holder.name)
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
        ("other file", r"do not agree .*: model\.norm\.weight"),
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


def test_a_layer_more_than_the_configuration_speaks_of_is_unexpected(tmp_path: Path) -> None:
    make(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"unexpected: model\.layers\.2\."):
        from_hf(tmp_path / "hf", tmp_path / "model.ckpt")


def test_no_room_for_scratch_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "hf")

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("unable to resize file: No space left on device")

    monkeypatch.setattr(torch, "from_file", full)
    with pytest.raises(OSError, match=r"has no room for [\d,]+ bytes of scratch"):
        from_hf(tmp_path / "hf", tmp_path / "out/model.ckpt")
    assert list((tmp_path / "out").iterdir()) == []


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


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "model.ckpt")
    before = sorted(tmp_path.iterdir())

    def fail(tensors: Any, path: Path, **_: Any) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        to_hf(tmp_path / "model.ckpt", tmp_path / "back")
    assert sorted(tmp_path.iterdir()) == before


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
