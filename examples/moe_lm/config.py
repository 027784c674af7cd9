"""The geometry of the model, and how many parameters follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

AttentionKind = Literal["gqa", "mla"]


class ParameterCount(NamedTuple):
    """Numbers of parameters: all of them, and those that one token's forward pass touches."""

    total: int
    active: int


@dataclass(frozen=True)
class ModelConfig:
    """Geometry of the decoder. Field names are those of DeepSeek-V3's published configuration where it has them.

    Args:
        vocab_size: number of token ids; 257 = 256 bytes and one document separator.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of decoder layers.
        first_k_dense_replace: this many first layers have one dense feed-forward instead of experts.
        num_attention_heads: query heads.
        attention: ``"mla"`` (multi-head latent attention) or ``"gqa"`` (grouped-query attention).
        num_key_value_heads: key/value heads, GQA only.
        head_dim: width of a head, GQA only.
        q_lora_rank: width of the compressed queries, MLA only; ``None`` (Moonlight) does not compress them.
        kv_lora_rank: width of the compressed keys and values, MLA only.
        qk_nope_head_dim: width of a query/key head's part without position, MLA only.
        qk_rope_head_dim: width of a query/key head's rotated part, MLA only; even.
        v_head_dim: width of a value head, MLA only.
        intermediate_size: inner width of a dense layer's feed-forward.
        moe_intermediate_size: inner width of one expert.
        n_routed_experts: experts that the router chooses from, per MoE layer.
        num_experts_per_tok: experts chosen per token.
        n_shared_experts: experts that see every token (computed as one of that many times the width).
        n_group: groups of as many experts each; a token first chooses groups, then experts in them (DeepSeek-V3 limits
            by that how many nodes a token travels to). 1 (Moonlight) chooses among all experts.
        topk_group: groups chosen per token.
        norm_topk_prob: make the chosen experts' weights sum to one (before scaling).
        routed_scaling_factor: factor on the routed experts' output, which keeps its size that of one expert's:
            ``gate_scale`` computes Moonlight's 2.446 for 6 of 64, and 1.41 for 2 of 8.
        bias_update_rate: step of the load-balancing bias per optimizer step; 1e-3 in DeepSeek-V3 and Moonlight.
        aux_loss_alpha: weight in the training loss of the sequence-wise balancing loss, summed over the layers; 0
            leaves it out, DeepSeek-V3 has 1e-4.
        max_seq_len: longest context in tokens; ``generate`` crops to it.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: epsilon inside RMSNorm's root.
        initializer_range: standard deviation of every matrix at the start.
    """

    vocab_size: int = 257
    hidden_size: int = 128
    num_hidden_layers: int = 4
    first_k_dense_replace: int = 1
    num_attention_heads: int = 4
    attention: AttentionKind = "mla"
    num_key_value_heads: int = 2
    head_dim: int = 32
    q_lora_rank: int | None = None
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 16
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    intermediate_size: int = 384
    moe_intermediate_size: int = 128
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.41
    bias_update_rate: float = 1e-3
    aux_loss_alpha: float = 0.0
    max_seq_len: int = 256
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.attention not in ("gqa", "mla"):
            raise ValueError(f"ModelConfig.attention is 'gqa' or 'mla', got {self.attention!r}")
        if self.rotated_dim % 2:
            raise ValueError(f"rotary embedding turns pairs: the rotated width must be even, got {self.rotated_dim}")
        if self.attention == "gqa" and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace={self.first_k_dense_replace} must lie between 0 and "
                f"num_hidden_layers={self.num_hidden_layers}"
            )
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"q_lora_rank={self.q_lora_rank} must be positive; None does not compress queries")
        if self.aux_loss_alpha < 0:
            raise ValueError(f"aux_loss_alpha={self.aux_loss_alpha} must not be negative")
        if self.n_group < 1 or self.n_routed_experts % self.n_group or not 1 <= self.topk_group <= self.n_group:
            raise ValueError(
                f"n_group={self.n_group} must divide n_routed_experts={self.n_routed_experts}, and "
                f"topk_group={self.topk_group} must lie between 1 and n_group"
            )
        if self.n_group > 1 and self.n_routed_experts < 2 * self.n_group:
            raise ValueError(
                f"a group is judged by its two best experts; n_group={self.n_group} leaves fewer than two of "
                f"n_routed_experts={self.n_routed_experts} in each"
            )
        eligible = self.n_routed_experts // self.n_group * self.topk_group
        if not 1 <= self.num_experts_per_tok <= eligible:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie between 1 and {eligible}, the experts in "
                f"{self.topk_group} of {self.n_group} groups of n_routed_experts={self.n_routed_experts}"
            )

    @property
    def rotated_dim(self) -> int:
        """How many numbers of each head know about positions."""
        return self.qk_rope_head_dim if self.attention == "mla" else self.head_dim

    @classmethod
    def of(cls, config: ModelConfig | Mapping[str, Any]) -> ModelConfig:
        """``config`` itself, or the one that ``asdict`` (as stored in a checkpoint) came from."""
        return config if isinstance(config, ModelConfig) else cls(**config)

    def asdict(self) -> dict[str, Any]:
        """The fields as plain numbers and strings."""
        return asdict(self)

    def num_parameters(self, *, embeddings: bool = True) -> ParameterCount:
        """Parameters by formula, without building the model.

        Args:
            embeddings: count the token embedding and the (untied) head; papers usually leave both out.
        """
        hidden, heads = self.hidden_size, self.num_attention_heads
        if self.attention == "mla":
            queries = heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
            rank = self.q_lora_rank
            query = queries * hidden if rank is None else rank * (hidden + 1 + queries)  # 1: its norm
            down = (self.kv_lora_rank + self.qk_rope_head_dim) * hidden + self.kv_lora_rank  # with its norm
            up = heads * (self.qk_nope_head_dim + self.v_head_dim) * self.kv_lora_rank
            attention = query + down + up + hidden * heads * self.v_head_dim
        else:
            attention = 2 * (heads + self.num_key_value_heads) * self.head_dim * hidden
        expert = 3 * hidden * self.moe_intermediate_size
        dense = 3 * hidden * self.intermediate_size
        router = self.n_routed_experts * hidden
        num_moe = self.num_hidden_layers - self.first_k_dense_replace
        common = self.num_hidden_layers * (attention + 2 * hidden) + hidden + self.first_k_dense_replace * dense
        common += num_moe * (router + self.n_shared_experts * expert)
        common += 2 * self.vocab_size * hidden if embeddings else 0
        return ParameterCount(
            total=common + num_moe * self.n_routed_experts * expert,
            active=common + num_moe * self.num_experts_per_tok * expert,
        )
