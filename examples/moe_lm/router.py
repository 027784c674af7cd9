"""Which experts a token goes to.

Shape suffixes: N tokens (batch times time), H hidden size, E routed experts, G groups of experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self, override

from .config import ModelConfig


class Routing(NamedTuple):
    """Which experts a token goes to, ``(N, K)`` int64, with which weights, ``(N, K)`` fp32, and how it scores all of
    them, ``(N, E)`` fp32."""

    experts: Tensor
    weights: Tensor
    scores: Tensor


class Router(nn.Linear):
    """Sigmoid scores in fp32; the bias helps to *choose* experts and never enters what they are weighted with.

    A subclass of ``nn.Linear``, so that everything which treats linear layers as matrices sees this one too.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.n_routed_experts, bias=False)
        self.top_k = config.num_experts_per_tok
        self.num_groups, self.top_k_groups = config.n_group, config.topk_group
        self.normalize = config.norm_topk_prob
        self.scaling = config.routed_scaling_factor
        # fp32 also where the default dtype is bf16: steps of 1e-3 on a bias near 1 vanish in bf16.
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    @override
    def forward(self, x_NH: Tensor) -> Routing:  # type: ignore[override]
        """``(N, H)`` to every token's experts, weights and scores."""
        # Autocast would send the product to bf16, where nearby scores tie.
        with torch.autocast(x_NH.device.type, enabled=False):
            scores_NE = F.linear(x_NH.float(), self.weight.float()).sigmoid()
        merit_NE = scores_NE.detach() + self.e_score_correction_bias
        if self.top_k_groups < self.num_groups:
            merit_NE = self._within_best_groups(merit_NE)
        experts_NK = merit_NE.topk(self.top_k, dim=-1, sorted=False).indices
        weights_NK = scores_NE.gather(-1, experts_NK)
        if self.normalize:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)  # DeepSeek-V3's guard against 0/0
        return Routing(experts_NK, weights_NK * self.scaling, scores_NE)

    def _within_best_groups(self, merit_NE: Tensor) -> Tensor:
        """The merits of the experts in the groups whose two best experts sum highest; the others' are -inf."""
        merit_NGE = merit_NE.view(len(merit_NE), self.num_groups, -1)
        group_merit_NG = merit_NGE.topk(2, dim=-1).values.sum(-1)
        best_NG = group_merit_NG.topk(self.top_k_groups, dim=-1, sorted=False).indices
        is_out_NG = torch.ones_like(group_merit_NG, dtype=torch.bool).scatter(-1, best_NG, False)
        return merit_NGE.masked_fill(is_out_NG.unsqueeze(-1), float("-inf")).flatten(-2)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follows ``.to(device)`` but keeps the bias in fp32, unrounded, through ``.to(torch.bfloat16)``."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.e_score_correction_bias
        self.e_score_correction_bias = after.float() if before.is_meta else before.to(after.device)
        return self
