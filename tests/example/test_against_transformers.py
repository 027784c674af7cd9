"""The same weights in transformers' DeepSeek-V3: the same logits and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM, next_token_nll
from tests.example.test_model import TINY

transformers = pytest.importorskip("transformers")

SHAPE = {**TINY, "routed_scaling_factor": 2.446, "rope_theta": 50_000.0, "n_shared_experts": 2}
KINDS: dict[str, dict[str, int]] = {
    "moonlight": {},
    "compressed queries": {"q_lora_rank": 12},
    "weights as they are": {"norm_topk_prob": False},
    "groups of experts": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
}


def to_oracle(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and tensors as transformers has them: gate and up projections of the experts in one stack."""
    out = dict(weights)
    for name in [name for name in weights if name.endswith("experts.gate_proj")]:
        up = out.pop(name.replace("gate_proj", "up_proj"))
        out[name.replace("gate_proj", "gate_up_proj")] = torch.cat((out.pop(name), up), dim=1)
    return out


def make_pair(kind: str) -> tuple[MoELM, torch.nn.Module]:
    fields: dict[str, Any] = {**SHAPE, **KINDS[kind]}
    ours = MoELM(ModelConfig(initializer_range=0.2, **fields)).eval()
    for layer in ours.moe_layers.values():
        layer.gate.e_score_correction_bias.normal_(std=0.3)
    left_out = ("head_dim", "rope_theta", "max_seq_len", "norm_topk_prob")
    shape = {key: value for key, value in fields.items() if key not in left_out}
    shape = {"num_experts_per_tok": 2, "q_lora_rank": None, "n_group": 1, "topk_group": 1, **shape}
    config = transformers.DeepseekV3Config(
        **{**shape, "num_key_value_heads": TINY["num_attention_heads"]},
        vocab_size=257,
        first_k_dense_replace=1,
        norm_topk_prob=ours.config.norm_topk_prob,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE["rope_theta"]},
        rope_interleave=True,
        num_mtp_layers=0,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    theirs = transformers.DeepseekV3ForCausalLM(config).eval()
    theirs.load_state_dict(to_oracle(ours.state_dict()), strict=True)
    return ours, theirs


def chosen_experts(model: torch.nn.Module, routers: list[torch.nn.Module], ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits (or what the model returns), and each router's choices, sorted."""
    chosen: list[Tensor] = []

    def note(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        chosen.append(next(one for one in output if one.dtype == torch.int64).sort(-1).values)

    handles = [router.register_forward_hook(note) for router in routers]
    out = model(ids)
    for handle in handles:
        handle.remove()
    return out, chosen


@pytest.mark.parametrize("kind", KINDS)
def test_routing_logits_and_gradients_equal_deepseek_v3(kind: str) -> None:
    ours, theirs = make_pair(kind)
    ids = torch.randint(257, (2, 17))
    logits, experts = chosen_experts(ours, [layer.gate for layer in ours.moe_layers.values()], ids[:, :-1])
    routers = [module for name, module in theirs.named_modules() if name.endswith("mlp.gate")]
    out, expected_experts = chosen_experts(theirs, routers, ids[:, :-1])
    assert len(experts) == len(expected_experts) == TINY["num_hidden_layers"] - 1
    assert all(torch.equal(a, b) for a, b in zip(experts, expected_experts, strict=True))
    expected = out.logits  # type: ignore[attr-defined]
    assert expected.std() > 0.5  # logits that say something
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)

    next_token_nll(logits, ids[:, 1:]).mean().backward()
    next_token_nll(expected, ids[:, 1:]).mean().backward()
    gradients = to_oracle({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    oracle = dict(theirs.named_parameters())
    assert gradients.keys() == oracle.keys()
    for name, parameter in oracle.items():
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
