"""Tiny random checkpoints of transformers' DeepSeek-V3, and the published key list of a model by rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from examples.moe_lm.config import ModelConfig

# Moonlight-16B-A3B's config.json: the published geometry, and the other keys that a file of its kind has.
MOONLIGHT: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}

TINY: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.446,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "num_mtp_layers": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
}
COMPRESSED = {"q_lora_rank": 12}
GROUPED = {"n_group": 2, "topk_group": 1}


def make(folder: Path, dtype: torch.dtype = torch.float32, *, fused: bool = False, **changes: Any) -> nn.Module:
    """A random model, saved by transformers, with routers' biases that matter."""
    import transformers

    shard_size = changes.pop("max_shard_size", "5GB")
    config = transformers.DeepseekV3Config(**{**TINY, **changes}, attn_implementation="eager", dtype=dtype)
    model = transformers.DeepseekV3ForCausalLM(config).to(dtype).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = torch.randn(buffer.shape) * 0.3
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            nn.init.normal_(parameter, std=0.2)
        elif parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1, std=0.2)  # norms that can be told from each other
    model.save_pretrained(folder, max_shard_size=shard_size, save_original_format=not fused)
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by an independent reading."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (no mapping)
    return found


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def published_keys(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a DeepSeek-V3 without compressed queries, as it is published, written down by rule."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    keys = {"model.embed_tokens.weight": (config.vocab_size, hidden), "lm_head.weight": (config.vocab_size, hidden)}
    keys["model.norm.weight"] = (hidden,)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        keys[f"{at}.input_layernorm.weight"] = keys[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        keys[f"{at}.self_attn.q_proj.weight"] = (heads * (config.qk_nope_head_dim + config.qk_rope_head_dim), hidden)
        keys[f"{at}.self_attn.kv_a_proj_with_mqa.weight"] = (config.kv_lora_rank + config.qk_rope_head_dim, hidden)
        keys[f"{at}.self_attn.kv_a_layernorm.weight"] = (config.kv_lora_rank,)
        rows = heads * (config.qk_nope_head_dim + config.v_head_dim)
        keys[f"{at}.self_attn.kv_b_proj.weight"] = (rows, config.kv_lora_rank)
        keys[f"{at}.self_attn.o_proj.weight"] = (hidden, heads * config.v_head_dim)
        if layer < config.first_k_dense_replace:
            feed_forwards = {f"{at}.mlp": config.intermediate_size}
        else:
            inner = config.moe_intermediate_size
            feed_forwards = {f"{at}.mlp.experts.{e}": inner for e in range(config.n_routed_experts)}
            feed_forwards[f"{at}.mlp.shared_experts"] = inner * config.n_shared_experts
            keys[f"{at}.mlp.gate.weight"] = (config.n_routed_experts, hidden)
            keys[f"{at}.mlp.gate.e_score_correction_bias"] = (config.n_routed_experts,)
        for prefix, width in feed_forwards.items():
            keys[f"{prefix}.gate_proj.weight"] = keys[f"{prefix}.up_proj.weight"] = (width, hidden)
            keys[f"{prefix}.down_proj.weight"] = (hidden, width)
    return keys
