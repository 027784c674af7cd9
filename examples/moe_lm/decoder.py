"""The decoder: embedding, layers of attention and feed-forward, final norm.

Parameter names follow DeepSeek-V3's published checkpoints (``layers.0.self_attn.q_proj.weight`` …).
Shape suffixes: B batch, T time (tokens), H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from .attention import build_attention
from .config import ModelConfig
from .layers import RMSNorm, Rotation, SwiGLU, rotation
from .moe import Experts, MixtureOfExperts


class DecoderLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        dense = index < config.first_k_dense_replace
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = build_attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else MixtureOfExperts(config)

    @override
    def forward(self, x_BTH: Tensor, rotation: Rotation) -> Tensor:
        """``(B, T, H)`` to the same shape."""
        x_BTH = x_BTH + self.self_attn(self.input_layernorm(x_BTH), rotation)
        out: Tensor = x_BTH + self.mlp(self.post_attention_layernorm(x_BTH))
        return out


class Decoder(nn.Module):
    """Token ids to the hidden states that a language-model head reads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rope_theta = config.rope_theta
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotated_dim = config.rotated_dim

    @override
    def forward(self, ids_BT: Tensor) -> Tensor:
        """``(B, T)`` token ids to ``(B, T, H)``."""
        x_BTH = self.embed_tokens(ids_BT)
        angles = rotation(ids_BT.shape[1], self.rotated_dim, self.rope_theta, ids_BT.device)
        for layer in self.layers:
            x_BTH = layer(x_BTH, angles)
        out: Tensor = self.norm(x_BTH)
        return out


@torch.no_grad()
def init_weights(module: nn.Module, std: float) -> None:
    """Every matrix, embedding and expert from a normal distribution of deviation ``std``; norms stay one."""
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Embedding)):
            child.weight.normal_(std=std)
        elif isinstance(child, Experts):
            for stack in child.parameters():
                stack.normal_(std=std)
