"""Attention, positions and the whole decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from examples.moe_lm.config import AttentionKind, ModelConfig
from examples.moe_lm.layers import RMSNorm, rotate, rotation
from examples.moe_lm.model import MoELM
from tests.example.moe_lm_reference import rotate_reference

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "max_seq_len": 16,
}


def tiny(attention: AttentionKind = "mla") -> MoELM:
    return MoELM(ModelConfig(attention=attention, initializer_range=0.2, **TINY))


@pytest.mark.parametrize(("attention", "q_lora_rank"), [("gqa", None), ("mla", None), ("mla", 12)])
def test_logits_have_a_row_per_token_and_know_only_the_past(attention: AttentionKind, q_lora_rank: int | None) -> None:
    shape = ModelConfig(attention=attention, q_lora_rank=q_lora_rank, initializer_range=0.2, **TINY)
    model = MoELM(shape).eval()
    ids = torch.randint(257, (2, 12))
    logits = model(ids)
    assert logits.shape == (2, 12, 257)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 257
    difference = (model(changed) - logits).abs().amax(dim=(0, 2))
    assert difference[:7].max() == 0
    assert (difference[7:] > 1e-6).all()


def test_rotation_equals_complex_numbers() -> None:
    x = torch.randn(2, 3, 9, 8)
    ours = rotate(x, rotation(9, 8, 10_000.0, x.device))
    torch.testing.assert_close(ours, rotate_reference(x, 10_000.0), atol=1e-6, rtol=1e-5)


def test_rotated_products_depend_on_distance_only() -> None:
    q, k = torch.randn(8).double(), torch.randn(8).double()
    table = rotation(12, 8, 100.0, q.device)
    q_all, k_all = rotate(q.float().expand(1, 1, 12, 8), table), rotate(k.float().expand(1, 1, 12, 8), table)
    products = q_all[0, 0] @ k_all[0, 0].T
    torch.testing.assert_close(products[3, 1], products[11, 9], atol=1e-5, rtol=1e-5)


def test_rms_norm_is_computed_in_fp32() -> None:
    norm = RMSNorm(64, 1e-5).to(torch.bfloat16)
    x = (torch.randn(5, 64) * 300).to(torch.bfloat16)
    expected = (x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()).to(torch.bfloat16)
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), expected, atol=0, rtol=2**-7)  # one rounding to bf16


@pytest.mark.parametrize(("attention", "q_lora_rank"), [("gqa", None), ("mla", None), ("mla", 12)])
def test_formula_counts_the_built_model(attention: AttentionKind, q_lora_rank: int | None) -> None:
    model = MoELM(ModelConfig(attention=attention, q_lora_rank=q_lora_rank, **TINY))
    config = model.config
    assert config.num_parameters().total == sum(p.numel() for p in model.parameters())
    idle = config.n_routed_experts - config.num_experts_per_tok
    idle_size = (config.num_hidden_layers - 1) * idle * 3 * 32 * 16
    assert config.num_parameters().total - config.num_parameters().active == idle_size
    assert config.num_parameters().total - config.num_parameters(embeddings=False).total == 2 * 257 * 32


def test_moonlight_has_its_published_size() -> None:
    preset = Path(__file__).parents[2] / "examples/moe_lm/configs/moonlight_16b_a3b.yaml"
    config = ModelConfig(**yaml.safe_load(preset.read_text())["model"]["config"])
    with torch.device("meta"):
        model = MoELM(config)
    total, active = config.num_parameters(embeddings=False)
    inner = {name: p for name, p in model.named_parameters() if "embed_tokens" not in name and "lm_head" not in name}
    assert sum(p.numel() for p in inner.values()) == total
    # arXiv 2502.16982 gives 15.29 B and 2.24 B without embeddings; by hand, from the shapes, 15.289 and 2.2436.
    assert total / 1e9 == pytest.approx(15.289, abs=5e-4)
    vectors = sum(p.numel() for p in inner.values() if p.ndim == 1)  # the hand count leaves norms out
    assert (active - vectors) / 1e9 == pytest.approx(2.2436, abs=5e-5)


def test_generate_is_repeatable_and_crops_its_context() -> None:
    model = tiny().train()
    prompt = torch.randint(257, (1, 5))
    first, second = (model.generate(prompt, 20, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.shape == (1, 25)
    assert torch.equal(first, second)
    assert torch.equal(first[:, :5], prompt)
    assert model.training
    assert torch.equal(model.generate(prompt, 4, temperature=0), model.generate(prompt, 4, temperature=0))
    likeliest = model.eval()(first[:, -16:])[:, -1].argmax(-1)
    assert torch.equal(model.generate(first, 1, temperature=0)[:, -1], likeliest)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
        ({"qk_rope_head_dim": 3}, "must be even"),
        ({"n_group": 0}, "n_group=0 must divide"),
        ({"first_k_dense_replace": 9}, "between 0 and num_hidden_layers=4"),
        ({"q_lora_rank": 0}, "q_lora_rank=0 must be positive"),
        ({"aux_loss_alpha": -0.1}, "must not be negative"),
        ({"n_group": 3}, "n_group=3 must divide n_routed_experts=8"),
        ({"n_group": 2, "topk_group": 3}, "topk_group=3 must lie between 1 and n_group"),
        ({"n_group": 8}, "fewer than two"),
        ({"n_group": 4, "num_experts_per_tok": 3}, "num_experts_per_tok=3 must lie between 1 and 2"),
        ({"attention": "mha"}, "'gqa' or 'mla'"),
        ({"attention": "gqa", "num_key_value_heads": 3}, "multiple of"),
    ],
)
def test_config_refuses_what_cannot_be_built(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.of(wrong)
