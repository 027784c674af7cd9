"""The mixture-of-experts layer.

Shape suffixes: B batch, T time (tokens), N tokens (batch times time), H hidden size, E routed experts, K experts per
token, S = N*K token-expert pairs, sorted by expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from .balancing import count_tokens, is_recomputing, sequence_loss
from .config import ModelConfig
from .experts import Experts
from .layers import SwiGLU
from .router import Router, Routing


class MixtureOfExperts(nn.Module):
    """Routed experts chosen per token, plus shared experts that see every token.

    Attributes:
        tokens_per_expert: ``(E,)`` int64, counted in training since ``balance`` last took it.
        sequence_loss: of the last training forward, ``aux_loss_alpha`` included, until it is taken; else ``None``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.bias_update_rate, self.aux_loss_alpha = config.bias_update_rate, config.aux_loss_alpha
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
        # Not a buffer: DDP overwrites every rank's buffers with rank 0's at each forward, and these differ per rank.
        self.tokens_per_expert: Tensor | None = None
        self.sequence_loss: Tensor | None = None

    @override
    def forward(self, x_BTH: Tensor) -> Tensor:
        """``(B, T, H)`` to the same shape."""
        x_NH = x_BTH.flatten(0, -2)
        routing = self.gate(x_NH)
        experts_NK, weights_NK, *_ = routing
        tokens_per_expert_E = count_tokens(experts_NK, self.num_experts)
        if self.training:
            loss = self._sequence_loss(routing, num_sequences=x_BTH.shape[0])
            if not is_recomputing():
                self.sequence_loss = loss
                self._count(tokens_per_expert_E)
        order_S = experts_NK.flatten().argsort(stable=True)
        token_S = order_S // experts_NK.shape[1]
        out_SH = self.experts(x_NH[token_S], tokens_per_expert_E)
        out_SH = out_SH * weights_NK.flatten()[order_S].unsqueeze(-1).to(out_SH.dtype)
        routed_NH = torch.zeros_like(x_NH, dtype=out_SH.dtype).index_add(0, token_S, out_SH)
        out: Tensor = routed_NH.view_as(x_BTH) + self.shared_experts(x_BTH)
        return out

    def _sequence_loss(self, routing: Routing, num_sequences: int) -> Tensor | None:
        if not self.aux_loss_alpha:
            return None
        scores_BTE = routing.scores.view(num_sequences, -1, self.num_experts)
        return self.aux_loss_alpha * sequence_loss(scores_BTE, self.gate.top_k)

    def _count(self, tokens_per_expert_E: Tensor) -> None:
        if self.tokens_per_expert is None or self.tokens_per_expert.device != tokens_per_expert_E.device:
            self.tokens_per_expert = tokens_per_expert_E
        else:
            self.tokens_per_expert = self.tokens_per_expert + tokens_per_expert_E
