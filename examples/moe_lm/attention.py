"""Causal self-attention: grouped-query (GQA) and multi-head latent (MLA), behind one call.

Shape suffixes: B batch, T time (tokens), A query heads, G key/value heads, D width of a head, H hidden size,
C compressed width (``kv_lora_rank``), R rotated width of a head; of ``rotation_TD``, D is half of that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from .config import ModelConfig
from .layers import RMSNorm, rotate

# DeepSeek-V3's code leaves the latents' norms at their class's default and passes the configured epsilon to all others.
_LATENT_NORM_EPS = 1e-6


class GroupedQueryAttention(nn.Module):
    """Several query heads share one key/value head; every head is rotated whole."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    @override
    def forward(self, x_BTH: Tensor, rotation_TD: Tensor) -> Tensor:
        """``(B, T, H)`` to the same shape."""
        q_BATD, k_BGTD, v_BGTD = (
            projection(x_BTH).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_BATD = F.scaled_dot_product_attention(
            rotate(q_BATD, rotation_TD), rotate(k_BGTD, rotation_TD), v_BGTD, is_causal=True, enable_gqa=True
        )
        out: Tensor = self.o_proj(out_BATD.transpose(1, 2).flatten(-2))
        return out


class MultiHeadLatentAttention(nn.Module):
    """Keys and values of all heads come from one narrow latent; one rotated key is shared by all heads.

    Only the rotated part of queries and keys knows about positions. With ``q_lora_rank`` (DeepSeek-V3) queries come
    from a latent of their own; without (Moonlight) from the residual stream.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qk_split = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        self.kv_split = [config.qk_nope_head_dim, config.v_head_dim]
        self.latent_split = [config.kv_lora_rank, config.qk_rope_head_dim]
        queries = self.num_heads * sum(self.qk_split)
        self.compresses_queries = config.q_lora_rank is not None
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, _LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, sum(self.latent_split), bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, _LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, self.num_heads * sum(self.kv_split), bias=False)
        self.o_proj = nn.Linear(self.num_heads * config.v_head_dim, config.hidden_size, bias=False)

    @override
    def forward(self, x_BTH: Tensor, rotation_TD: Tensor) -> Tensor:
        """``(B, T, H)`` to the same shape."""
        if self.compresses_queries:
            q_BTD = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTH)))
        else:
            q_BTD = self.q_proj(x_BTH)
        q_BATD = q_BTD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q_plain, q_rotated = q_BATD.split(self.qk_split, dim=-1)
        latent_BTC, k_BTR = self.kv_a_proj_with_mqa(x_BTH).split(self.latent_split, dim=-1)
        kv_BTAD = self.kv_b_proj(self.kv_a_layernorm(latent_BTC)).unflatten(-1, (self.num_heads, -1))
        k_plain, v_BATD = kv_BTAD.transpose(1, 2).split(self.kv_split, dim=-1)
        k_rotated = rotate(k_BTR.unsqueeze(1), rotation_TD).expand(-1, self.num_heads, -1, -1)
        out_BATD = F.scaled_dot_product_attention(
            torch.cat((q_plain, rotate(q_rotated, rotation_TD)), dim=-1),
            torch.cat((k_plain, k_rotated), dim=-1),
            v_BATD,
            is_causal=True,
        )
        out: Tensor = self.o_proj(out_BATD.transpose(1, 2).flatten(-2))
        return out


def build_attention(config: ModelConfig) -> GroupedQueryAttention | MultiHeadLatentAttention:
    """The kind of attention that ``config.attention`` names."""
    return MultiHeadLatentAttention(config) if config.attention == "mla" else GroupedQueryAttention(config)
