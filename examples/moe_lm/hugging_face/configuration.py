"""``config.json`` of a DeepSeek-V3 and ``ModelConfig``, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from examples.moe_lm.config import ModelConfig

from .errors import ConversionError

__all__ = ["from_hugging_face", "to_hugging_face"]

# our field -> theirs; all of them count something
_SHAPES = {
    field: field
    for field in (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank"),
        *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size"),
        *("n_routed_experts", "num_experts_per_tok", "n_shared_experts", "n_group", "topk_group"),
    )
} | {"max_seq_len": "max_position_embeddings"}
_NUMBERS = ("routed_scaling_factor", "rms_norm_eps", "initializer_range")
# Of training alone; what is absent has our default. `bias_update_rate` is our own name for it.
_OPTIONAL = ("aux_loss_alpha", "bias_update_rate")
# What the model is: a file that lacks the key means this, too.
_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
_MODEL_TYPE, _CLASS = "deepseek_v3", "DeepseekV3ForCausalLM"


def from_hugging_face(config: Mapping[str, Any]) -> ModelConfig:
    """The geometry that a ``config.json`` describes, as ``transformers`` 4 or 5 or DeepSeek's own code writes it.

    Raises:
        ConversionError: It describes what the model cannot do, or lacks a field. Every such field is named.
    """
    troubles = _refusals(config)
    fields: dict[str, Any] = {"attention": "mla"}
    for ours, theirs in _SHAPES.items():
        fields[ours] = _integer(config, theirs, 1, troubles)
    fields["first_k_dense_replace"] = _integer(config, "first_k_dense_replace", 0, troubles)
    if "q_lora_rank" not in config:  # transformers would take 1536
        troubles.append("q_lora_rank is missing: null says that queries are not compressed")
    elif config["q_lora_rank"] is not None:
        fields["q_lora_rank"] = _integer(config, "q_lora_rank", 1, troubles)
    for name in _NUMBERS:
        fields[name] = _number(config, name, troubles)
    fields |= {name: _number(config, name, troubles) for name in _OPTIONAL if config.get(name) is not None}
    fields["norm_topk_prob"] = config.get("norm_topk_prob")
    if not isinstance(fields["norm_topk_prob"], bool):
        troubles.append(f"norm_topk_prob={fields['norm_topk_prob']!r}: true or false is expected")
    fields["rope_theta"] = _rope_theta(config, troubles)
    if not troubles:
        try:
            return ModelConfig(**fields)
        except ValueError as error:
            troubles.append(str(error))
    raise ConversionError("config.json cannot be taken over: " + "; ".join(troubles) + ".")


def to_hugging_face(
    config: ModelConfig, dtype: torch.dtype, like: Mapping[str, Any] | None = None, *, keep_code: bool = False
) -> dict[str, Any]:
    """A ``config.json`` that ``transformers`` loads as ``DeepseekV3ForCausalLM``.

    Args:
        config: With latent attention.
        dtype: Of the weights.
        like: Another ``config.json`` of a DeepSeek-V3, whose fields are kept, in its spelling, where they say the same
            or are none of the model's.
        keep_code: Keep ``auto_map``, which names code beside the weights.

    Raises:
        ConversionError: The attention is none that DeepSeek-V3 has.
    """
    if config.attention != "mla":
        raise ConversionError(
            f"The model has attention={config.attention!r}, and a DeepSeek-V3 is 'mla': train with that to export it."
        )
    default, ours = ModelConfig(), config.asdict()
    written = {
        "architectures": [_CLASS],
        "model_type": _MODEL_TYPE,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "first_k_dense_replace": config.first_k_dense_replace,
        "norm_topk_prob": config.norm_topk_prob,
        "num_key_value_heads": config.num_attention_heads,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": config.q_lora_rank,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "seq_aux": True,
        **{theirs: ours[field] for field, theirs in _SHAPES.items()},
        **{name: ours[name] for name in _NUMBERS},
        **_FIXED,
        "aux_loss_alpha": config.aux_loss_alpha,
    }
    if config.bias_update_rate != default.bias_update_rate:
        written["bias_update_rate"] = config.bias_update_rate
    if like is None or like.get("model_type") != _MODEL_TYPE:
        extras = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": True}
        return dict(sorted({**written, **extras}.items()))
    return _merged(written, like, keep_code)


def _merged(written: dict[str, Any], like: Mapping[str, Any], keep_code: bool) -> dict[str, Any]:
    merged = dict(like)
    for key in ("quantization_config",) if keep_code else ("quantization_config", "auto_map"):
        merged.pop(key, None)
    if "dtype" in like:  # transformers 5's name for it
        written["dtype"] = written.pop("torch_dtype")
    unsaid: dict[str, Any] = {**_FIXED, "aux_loss_alpha": 0.0, "seq_aux": True, "num_nextn_predict_layers": 0}
    if _rope_theta(like, []) == written["rope_theta"]:
        del written["rope_theta"], written["rope_scaling"]
    else:
        merged.pop("rope_parameters", None)
        unsaid["rope_scaling"] = None
    for key, value in written.items():
        said = merged.get(key) if key in merged or key not in unsaid else unsaid[key]
        if said != value or (key not in merged and key not in unsaid):
            merged[key] = value
    if "bias_update_rate" not in written:
        merged.pop("bias_update_rate", None)
    return merged


def _refusals(config: Mapping[str, Any]) -> list[str]:
    """What the model cannot be."""
    troubles = []
    if config.get("model_type") != _MODEL_TYPE:
        troubles.append(f"model_type={config.get('model_type')!r}: only {_MODEL_TYPE!r} is read")
    for key, value in _FIXED.items():
        if key in config and config[key] != value:
            troubles.append(f"{key}={config[key]!r}: the model has {value!r} and no other")
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        troubles.append(f"num_key_value_heads={kv_heads!r}: latent attention has as many as query heads, {heads!r}")
    if config.get("aux_loss_alpha") and config.get("seq_aux", True) is not True:
        troubles.append("seq_aux=False: the auxiliary loss is per sequence; set aux_loss_alpha to 0 to go without")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        troubles.append(f"quantization_config ({method}): convert the weights to bfloat16 first, and remove the entry")
    return troubles


def _rope_theta(config: Mapping[str, Any], troubles: list[str]) -> float:
    """The base of the frequencies: transformers 5 has it in ``rope_parameters``, 4 beside ``rope_scaling``."""
    rope = config.get("rope_parameters") or {}
    for stretched in (rope, config.get("rope_scaling") or {}):
        kind = stretched.get("rope_type", stretched.get("type", "default"))
        if kind != "default":
            troubles.append(
                f"rope type {kind!r}: the model has plain rotary positions; checkpoints from before the context was"
                " extended have those"
            )
    return _number({"rope_theta": rope.get("rope_theta", config.get("rope_theta"))}, "rope_theta", troubles)


def _integer(config: Mapping[str, Any], key: str, least: int, troubles: list[str]) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        troubles.append(f"{key}={value!r}: an integer of at least {least} is expected")
        return least
    return value


def _number(config: Mapping[str, Any], key: str, troubles: list[str]) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        troubles.append(f"{key}={value!r}: a number is expected")
        return 0.0
    return float(value)
