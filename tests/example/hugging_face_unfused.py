"""The fused parameters of tiny models as separate matrices ``(out, in)``, sliced as their forward passes do."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor

Unfuse = Callable[[Tensor], list[Tensor]]
HEADS, GROUPS, HEAD_DIM = 4, 2, 8  # of `hugging_face_models`


def _by_heads(weight: Tensor) -> list[Tensor]:
    return [part.flatten(0, 1) for part in weight.view(HEADS, 3, HEAD_DIM, -1).unbind(1)]


def _by_groups(weight: Tensor) -> list[Tensor]:
    heads = weight.view(GROUPS, HEADS // GROUPS + 2, HEAD_DIM, -1)
    return [heads[:, :-2].flatten(0, 2), heads[:, -2].flatten(0, 1), heads[:, -1].flatten(0, 1)]


def _split(*sizes: int) -> Unfuse:
    return lambda weight: list(weight.split(sizes))


def _runs(count: int, *sizes: int) -> Unfuse:
    return lambda weight: [part.flatten(0, 1) for part in weight.view(count, sum(sizes), -1).split(sizes, dim=1)]


_CONCATENATED: dict[str, Unfuse] = {
    r"experts\.gate_up_proj$": lambda stack: [half for expert in stack for half in expert.chunk(2)],
    r"experts\.down_proj$": list,
}
_CONV1D: dict[str, Unfuse] = {
    r"c_attn\.weight$": lambda weight: list(weight.T.chunk(3)),
    r"(c_proj|c_fc)\.weight$": lambda weight: [weight.T],
}
_QUERY_KEY_VALUE: dict[str, Unfuse] = {"query_key_value.weight": _by_heads}

UNFUSED: dict[str, dict[str, Unfuse]] = {
    "gpt2": _CONV1D,
    "gpt_bigcode": {r"c_attn\.weight$": _by_heads},
    "gpt_bigcode_multi_query": {r"c_attn\.weight$": _split(32, 8, 8)},
    "codegen": {"qkv_proj": _runs(4, 8, 8, 8)},
    "phi3": {"qkv_proj": _split(32, 16, 16), "gate_up_proj": _split(48, 48)},
    "gpt_neox": _QUERY_KEY_VALUE,
    "persimmon": _QUERY_KEY_VALUE,
    "bloom": _QUERY_KEY_VALUE,
    "falcon": {"query_key_value": _split(32, 8, 8)},
    "falcon_heads": _QUERY_KEY_VALUE,
    "falcon_groups": {"query_key_value": _by_groups},
    "gpt_oss": {
        r"experts\.gate_up_proj$": lambda stack: [expert[:, n::2].T for expert in stack for n in (0, 1)],
        r"experts\.down_proj$": lambda stack: [expert.T for expert in stack],
    },
    "llama4_text": {
        r"experts\.gate_up_proj$": lambda stack: [half.T for expert in stack for half in expert.chunk(2, dim=1)],
        r"experts\.down_proj$": lambda stack: [expert.T for expert in stack],
    },
    "qwen3_next": {
        **_CONCATENATED,
        r"in_proj_qkvz": _runs(2, 8, 8, 8, 8),
        r"in_proj_ba": _runs(2, 2, 2),
        r"q_proj": _runs(HEADS, HEAD_DIM, HEAD_DIM),
    },
    "qwen3_5_text": {r"in_proj_qkv\.": _split(16, 16, 16), r"q_proj": _runs(HEADS, HEAD_DIM, HEAD_DIM)},
    "mamba": {r"in_proj": _split(64, 64), r"x_proj": _split(2, 4, 4)},  # x_proj: dt, B, C
    "mamba2": {r"in_proj": _split(64, 64, 8, 8, 8)},
    "granitemoehybrid": {**_CONCATENATED, r"in_proj": _split(64, 64, 8, 8, 8), r"input_linear": _split(24, 24)},
    "jetmoe": {
        r"mlp\.input_linear": lambda stack: [half for expert in stack for half in expert.chunk(2)],
        r"(input|output)_linear": list,
        r"kv_proj": _split(16, 16),
    },
    "minimax": {**_CONCATENATED, r"qkv_proj": _by_heads},
    "modernbert-decoder": {r"Wi": _split(48, 48)},
    "recurrent_gemma": {r"gate_weight": lambda stack: [head.T for head in stack]},
    "dbrx": {
        r"Wqkv": _split(32, 16, 16),
        r"mlp\.(w1|v1)$": lambda weight: list(weight.view(4, 48, -1)),
        r"mlp\.w2$": lambda weight: [expert.T for expert in weight.view(4, 48, -1)],
    },
}


def unfuse(model: str, name: str, tensor: Tensor) -> list[Tensor]:
    """The matrices of a parameter, or of its gradient; a matrix that is not fused is one."""
    ways = UNFUSED.get(model, _CONCATENATED)
    return next((way(tensor) for pattern, way in ways.items() if re.search(pattern, name)), [tensor])
