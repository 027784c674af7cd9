"""Tiny models of `transformers`, each with random weights of a size that makes its parts matter."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_MOE = {**_LLAMA, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA},
    "llama_tied": {"model_type": "llama", **_LLAMA, "tie_word_embeddings": True},
    "qwen2_moe": {"model_type": "qwen2_moe", **_MOE, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    "qwen3_moe": {"model_type": "qwen3_moe", **_MOE, "decoder_sparse_step": 1},
    "gpt2": {"model_type": "gpt2", **_GPT2},
    "gpt_bigcode": {"model_type": "gpt_bigcode", **_GPT2, "multi_query": False},
    "gpt_bigcode_multi_query": {"model_type": "gpt_bigcode", **_GPT2, "multi_query": True},
    "codegen": {"model_type": "codegen", **_GPT2, "rotary_dim": 4, "n_head": 8},
    "mixtral": {"model_type": "mixtral", **_LLAMA, "num_local_experts": 4},
    "phi3": {"model_type": "phi3", **_LLAMA},
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        **_LLAMA,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_mtp_layers": 0,
    },
    "gpt_neox": {"model_type": "gpt_neox", **_LLAMA},
    "persimmon": {"model_type": "persimmon", **_LLAMA, "qk_layernorm": False},
    "bloom": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"model_type": "falcon", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "falcon_heads": {
        "model_type": "falcon",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "multi_query": False,
    },
    "falcon_groups": {
        "model_type": "falcon",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
    },
    "gpt_oss": {"model_type": "gpt_oss", **_LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        "model_type": "llama4_text",
        **_LLAMA,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 1,
    },
    "qwen3_next": {
        "model_type": "qwen3_next",
        **_MOE,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 4,
    },
    "qwen3_5_text": {
        "model_type": "qwen3_5_text",
        **_LLAMA,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 4,
    },
    "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {
        "model_type": "mamba2",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 4,
        "n_groups": 2,
    },
    "granitemoehybrid": {
        "model_type": "granitemoehybrid",
        **_LLAMA,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 4,
        "mamba_n_groups": 2,
    },
    "jetmoe": {
        "model_type": "jetmoe",
        **{key: value for key, value in _LLAMA.items() if "attention_heads" not in key},
        "num_key_value_heads": 2,
        "kv_channels": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "minimax": {
        "model_type": "minimax",
        **_LLAMA,
        "head_dim": 8,
        "num_local_experts": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 4,
    },
    "modernbert-decoder": {
        "model_type": "modernbert-decoder",
        **{f"{token}_token_id": 0 for token in ("pad", "bos", "eos", "cls", "sep")},
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "recurrent_gemma": {
        "model_type": "recurrent_gemma",
        **_LLAMA,
        "lru_width": 32,
        "block_types": ["recurrent", "attention"],
    },
    "longcat_flash": {
        "model_type": "longcat_flash",
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "num_layers": 1,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "dbrx": {
        "model_type": "dbrx",
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
}


def tiny(name: str, seed: int = 0) -> Any:
    """A model in training mode, without dropout, in float32; 257 tokens."""
    settings = {"vocab_size": 257, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, **CONFIGS[name]}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    for key in [key for key in config.to_dict() if "drop" in key]:
        if isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim > 1:
                torch.nn.init.normal_(param, std=0.15)
    return model.train()
