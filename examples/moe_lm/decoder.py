"""The decoder: embedding, layers of attention and feed-forward, final norm.

Parameter names follow DeepSeek-V3's published checkpoints (``layers.0.self_attn.q_proj.weight`` …).
Shape suffixes: B batch, T time (tokens), H hidden size, D half the rotated width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from .attention import build_attention
from .config import ModelConfig
from .experts import Experts
from .layers import RMSNorm, SwiGLU, rotation
from .moe import MixtureOfExperts


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
    def forward(self, x_BTH: Tensor, rotation_TD: Tensor) -> Tensor:
        """``(B, T, H)`` to the same shape."""
        x_BTH = x_BTH + self.self_attn(self.input_layernorm(x_BTH), rotation_TD)
        out: Tensor = x_BTH + self.mlp(self.post_attention_layernorm(x_BTH))
        return out


class Decoder(nn.Module):
    """Token ids to the hidden states that a language-model head reads.

    Args:
        config: the geometry.
        activation_checkpointing: keep only the layers' inputs for the backward pass and compute the rest again.
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.rope_theta = config.rope_theta
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotated_dim = config.rotated_dim

    @override
    def forward(self, ids_BT: Tensor) -> Tensor:
        """``(B, T)`` token ids to ``(B, T, H)``."""
        x_BTH = self.embed_tokens(ids_BT)
        rotation_TD = rotation(ids_BT.shape[1], self.rotated_dim, self.rope_theta, ids_BT.device)
        for layer in self.layers:
            if self.activation_checkpointing and self.training:
                x_BTH = checkpoint(layer, x_BTH, rotation_TD, use_reentrant=False)
            else:
                x_BTH = layer(x_BTH, rotation_TD)
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
