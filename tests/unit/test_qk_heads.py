"""Which rows make a head: found by names, described, and refused with a reason."""

import pytest
import torch
from torch import nn

import lightning_muon as lm
from lightning_muon.attention.find import find_attention, require_clippable
from tests.attention_models import Fused, build, describe

transformers = pytest.importorskip("transformers")


def rows(attention, head):
    return {(own.projection, own.start, own.stop, own.power) for own in attention.heads.rows[head]}


@pytest.mark.parametrize("kind", ["mha", "gqa", "mqa", "mla", "bias", "fused"])
def test_each_kind(kind):
    model = build(kind)
    (found,) = find_attention(model, describe)
    expected = {
        "mha": {("q_proj", 6, 12, 0.5), ("k_proj", 6, 12, 0.5)},
        "gqa": {("q_proj", 6, 12, 1.0)},
        "mqa": {("q_proj", 6, 12, 1.0)},
        "mla": {("q_proj", 9, 14, 0.5), ("q_proj", 14, 18, 1.0), ("kv_b_proj", 8, 13, 0.5)},
        "bias": {("q_proj", 6, 12, 0.5), ("k_proj", 6, 12, 0.5)},
        "fused": {("qkv", 6, 12, 0.5), ("qkv", 30, 36, 0.5)},
    }
    assert rows(found, 1) == expected[kind]
    assert found.heads.num_heads == 4
    assert found.name == ("" if kind in ("bias", "fused") else "self_attn")


DEEPSEEK = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "kv_lora_rank": 10, "num_attention_heads": 4}
DEEPSEEK |= {"num_key_value_heads": 4, "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 11, "head_dim": 4}


@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_transformers_deepseek(q_lora_rank):
    config = transformers.DeepseekV3Config(q_lora_rank=q_lora_rank, first_k_dense_replace=1, **DEEPSEEK)
    (found,) = find_attention(transformers.DeepseekV3ForCausalLM(config))
    query = "q_proj" if q_lora_rank is None else "q_b_proj"
    assert found.name == "model.layers.0.self_attn"
    assert rows(found, 3) == {(query, 36, 44, 0.5), (query, 44, 48, 1.0), ("kv_b_proj", 42, 50, 0.5)}
    require_clippable([found])  # norms of the latents are before the projections


@pytest.mark.parametrize("model_type", ["Llama", "Qwen2"])
def test_transformers_grouped_query(model_type):
    config = getattr(transformers, f"{model_type}Config")(
        num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=8, num_hidden_layers=2
    )
    found = find_attention(getattr(transformers, f"{model_type}Model")(config))
    assert [one.name for one in found] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert rows(found[0], 1) == {("q_proj", 8, 16, 1.0)}
    assert len(found[0].parameters()) == (2 if model_type == "Qwen2" else 1)  # with its bias


def test_norms_behind_the_projections_are_refused():
    sizes = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.Qwen3Config(num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = transformers.Qwen3Model(config)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn normalises .*q_norm, k_norm.* log_only=True"):
        lm.QKClipper(model)
    lm.QKClipper(model, log_only=True).close()
    model.layers[0].self_attn.q_norm = model.layers[0].self_attn.k_norm = nn.Identity()
    lm.QKClipper(model).close()


def test_names_and_filters():
    model = nn.ModuleDict({name: build("mha") for name in ("first", "second")})
    compiled = torch.compile(model)
    assert [one.name for one in find_attention(compiled)] == ["first.self_attn", "second.self_attn"]
    assert [one.name for one in find_attention(model, include="second")] == ["second.self_attn"]
    assert [one.name for one in find_attention(model, exclude="second")] == ["first.self_attn"]
    heads = {"first.self_attn": lm.AttentionHeads.grouped_query(2, 12)}
    assert [one.heads.num_heads for one in find_attention(model, heads)] == [2, 4]


class Changed:
    """A model with something that does not go together."""

    @staticmethod
    def no_numbers():
        model = build("mha")
        del model.self_attn.head_dim
        return model

    @staticmethod
    def latent_without_numbers():
        model = build("mla")
        del model.self_attn.num_heads
        return model

    @staticmethod
    def other_numbers():
        model = build("mha")
        model.self_attn.num_heads = 3
        return model

    @staticmethod
    def other_key_heads():
        model = build("mha")
        model.self_attn.num_key_value_heads = 2
        return model

    @staticmethod
    def other_widths():
        model = build("mla")
        model.self_attn.qk_rope_head_dim = 5
        return model

    @staticmethod
    def gated_queries():
        model = build("bias")
        model.q_proj = nn.Linear(20, 50)
        return model

    @staticmethod
    def adapter():
        model = build("mha")
        model.self_attn.q_proj = nn.Sequential(model.self_attn.q_proj)
        return model

    @staticmethod
    def parametrized():
        model = build("mha")
        nn.utils.parametrizations.weight_norm(model.self_attn.k_proj)
        return model

    @staticmethod
    def none():
        return nn.Linear(3, 3)

    @staticmethod
    def shared():
        model = nn.ModuleDict({name: build("mha") for name in ("first", "second")})
        model["second"].self_attn.q_proj = model["first"].self_attn.q_proj
        return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no_numbers", "self_attn has q_proj and k_proj, and none of the attributes .* says how many heads"),
        ("latent_without_numbers", "self_attn has q_proj and kv_b_proj, and none of"),
        ("other_numbers", "num_heads=3, num_key_value_heads=4, head_dim=6 does not go together with: q_proj has 24"),
        ("other_key_heads", "num_key_value_heads=2, head_dim=6 does not go together with: k_proj has 24 rows"),
        ("other_widths", r"widths 5 \(plain\), 4 \(rotated\), 3 \(value\) .* qk_rope_head_dim=5"),
        ("gated_queries", "does not go together with: q_proj has 50 rows"),
        ("adapter", "self_attn.q_proj is a Sequential"),
        ("parametrized", "self_attn.k_proj is a Parametrized"),
        ("none", "No attention found"),
        ("shared", "first.self_attn and second.self_attn share a projection"),
    ],
)
def test_what_is_not_understood_is_said(change, message):
    with pytest.raises(ValueError, match=message):
        find_attention(getattr(Changed, change)())


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"": lm.AttentionHeads.grouped_query(4, 6, query="qk", key="qkv")}, "names 'qk', and no submodule"),
        ({"": lm.AttentionHeads.grouped_query(4, 6, query="qkv", key="qkv", key_start=60)}, "row 77 of qkv, which has"),
        ({"elsewhere": Fused.description}, "describes elsewhere, and the model has no such module"),
    ],
)
def test_descriptions_are_checked(heads, message):
    with pytest.raises(ValueError, match=message):
        find_attention(build("fused"), heads)


def test_a_description_is_checked_by_itself():
    with pytest.raises(ValueError, match="Row 5 of 'qkv' would be scaled twice"):
        lm.AttentionHeads.grouped_query(4, 6, query="qkv", key="qkv", key_start=5)
    with pytest.raises(ValueError, match="num_heads=4 must be a multiple of num_key_value_heads=3"):
        lm.AttentionHeads.grouped_query(4, 6, 3)
    with pytest.raises(ValueError, match="at least one head"):
        lm.AttentionHeads(())
    with pytest.raises(ValueError, match="expected 0 <= start < stop and a positive power"):
        lm.HeadRows("q_proj", 3, 3, 1.0)


def test_frozen_projections_are_refused():
    model = build("mha")
    model.self_attn.k_proj.requires_grad_(False)
    with pytest.raises(ValueError, match="self_attn is frozen"):
        lm.QKClipper(model)
    lm.QKClipper(model, log_only=True).close()
