"""Kinds of matrices, against all the parameters of the example's models."""

import torch

from benchmarks.claims.kinds import KINDS, by_kind, kind_of, matrices, parameters
from benchmarks.claims.scale_rule import WIDE
from benchmarks.claims.setting import MODEL
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM
from examples.moe_lm.optim import is_auxiliary


def test_every_parameter_of_the_models_has_the_kind_it_should() -> None:
    for fields in (MODEL, WIDE):
        with torch.device("meta"):
            model = MoELM(ModelConfig(**fields))
        for name, param in model.named_parameters():
            assert (kind_of(name) is None) == is_auxiliary(name, param), name


def test_kinds() -> None:
    names = {
        "model.layers.0.self_attn.q_proj.weight": "AttnQO",
        "model.layers.0.self_attn.o_proj.weight": "AttnQO",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": "AttnKV",
        "model.layers.0.self_attn.k_proj.weight": "AttnKV",
        "model.layers.0.mlp.gate_proj.weight": "Dense",
        "model.layers.1.mlp.gate.weight": "Router",
        "model.layers.1.mlp.experts.gate_proj": "Experts",
        "model.layers.1.mlp.experts.gate_proj.7": "Experts",
        "model.layers.1.mlp.shared_experts.down_proj.weight": "SharedExperts",
        "model.layers.1.self_attn.kv_a_layernorm.weight": None,
        "model.embed_tokens.weight": None,
        "lm_head.weight": None,
        "_mean": None,
    }
    assert {name: kind_of(name) for name in names} == names
    assert set(names.values()) - {None} == set(KINDS)
    assert by_kind(names)["Experts"] == [name for name, kind in names.items() if kind == "Experts"]
    assert "Router" not in by_kind(["model.layers.0.mlp.gate_proj.weight"])


def test_a_stack_is_one_parameter_and_many_matrices() -> None:
    stack, dense = "model.layers.1.mlp.experts.up_proj", "model.layers.0.mlp.up_proj.weight"
    values = {stack: 0.5, f"{stack}.min": 0.1, f"{stack}.max": 0.9, f"{stack}.0": 0.1, f"{stack}.1": 0.9, dense: 0.3}
    values |= {"lm_head.weight": 0.2, "_max": 0.9}
    assert parameters(values) == {stack: 0.5, dense: 0.3}
    assert matrices(values) == {f"{stack}.0": 0.1, f"{stack}.1": 0.9, dense: 0.3}
