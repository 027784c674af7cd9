"""The mixture-of-experts layer, and the bias that balances its load without an auxiliary loss.

Shape suffixes: N tokens (batch times time), H hidden size, I an expert's inner width, E routed experts,
K experts per token, S = N*K token-expert pairs, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self, override

from .config import ModelConfig
from .layers import SwiGLU


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
        experts_NK = (scores_NE.detach() + self.e_score_correction_bias).topk(self.top_k, dim=-1, sorted=False).indices
        weights_NK = scores_NE.gather(-1, experts_NK)
        if self.normalize:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)  # DeepSeek-V3's guard against 0/0
        return Routing(experts_NK, weights_NK * self.scaling, scores_NE)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follows ``.to(device)`` but keeps the bias in fp32, unrounded, through ``.to(torch.bfloat16)``."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.e_score_correction_bias
        self.e_score_correction_bias = after.float() if before.is_meta else before.to(after.device)
        return self


class Experts(nn.Module):
    """The routed experts' weights, as stacks of matrices: each of a parameter's E slices is a matrix of its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(num, inner, hidden))
        self.up_proj = nn.Parameter(torch.empty(num, inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num, hidden, inner))

    @override
    def forward(self, x_SH: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        """``(S, H)``, sorted by expert, to the same shape.

        An expert without tokens multiplies a matrix of no rows instead of being skipped, so that its gradient is zero
        and not missing: DDP waits for every parameter's gradient, and an optimizer that shards its state needs the
        same parameters on each rank. One ``unbind`` per stack makes its backward write the stack's gradient once.
        """
        chunks = torch.split(x_SH, tokens_per_expert_E.tolist())
        stacks = zip(chunks, self.gate_proj.unbind(), self.up_proj.unbind(), self.down_proj.unbind(), strict=True)
        return torch.cat([F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down) for x, gate, up, down in stacks])


class MixtureOfExperts(nn.Module):
    """Routed experts chosen per token, plus shared experts that see every token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.bias_update_rate = config.bias_update_rate
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
        # Not a buffer: DDP overwrites every rank's buffers with rank 0's at each forward, and these differ per rank.
        self.tokens_per_expert: Tensor | None = None

    @override
    def forward(self, x_BTH: Tensor) -> Tensor:
        """``(B, T, H)`` to the same shape."""
        x_NH = x_BTH.flatten(0, -2)
        experts_NK, weights_NK, *_ = self.gate(x_NH)
        tokens_per_expert_E = torch.bincount(experts_NK.flatten(), minlength=self.num_experts)
        if self.training:
            self._count(tokens_per_expert_E)
        order_S = experts_NK.flatten().argsort(stable=True)
        token_S = order_S // experts_NK.shape[1]
        out_SH = self.experts(x_NH[token_S], tokens_per_expert_E)
        out_SH = out_SH * weights_NK.flatten()[order_S].unsqueeze(-1).to(out_SH.dtype)
        routed_NH = torch.zeros_like(x_NH, dtype=out_SH.dtype).index_add(0, token_S, out_SH)
        out: Tensor = routed_NH.view_as(x_BTH) + self.shared_experts(x_BTH)
        return out

    def _count(self, tokens_per_expert_E: Tensor) -> None:
        if self.tokens_per_expert is None or self.tokens_per_expert.device != tokens_per_expert_E.device:
            self.tokens_per_expert = tokens_per_expert_E
        else:
            self.tokens_per_expert = self.tokens_per_expert + tokens_per_expert_E


@torch.no_grad()
def balance(layers: Mapping[str, MixtureOfExperts]) -> dict[str, Tensor]:
    """Moves every layer's bias towards equal load, from the tokens counted since the last call; starts counting anew.

    Call it once per optimizer step on *every* rank: it adds up the ranks' counts. The rule (DeepSeek-V3, with the mean
    taken off as Moonlight does, so that the biases do not drift together) is
    ``bias += rate * (sign(e) - mean(sign(e)))`` with ``e = mean load - load``.

    Args:
        layers: the model's MoE layers by name.

    Returns:
        For each layer MaxVio = (largest load - mean load) / mean load, a scalar: 0 is perfect balance.
    """
    counted = {name: layer for name, layer in layers.items() if layer.tokens_per_expert is not None}
    if not counted:
        return {}
    load_LE = torch.stack([cast(Tensor, layer.tokens_per_expert) for layer in counted.values()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(load_LE)
    load_LE = load_LE.float()
    mean_L1 = load_LE.mean(-1, keepdim=True)
    sign_LE = (mean_L1 - load_LE).sign()
    step_LE = sign_LE - sign_LE.mean(-1, keepdim=True)
    for layer, step_E in zip(counted.values(), step_LE, strict=True):
        layer.gate.e_score_correction_bias.add_(step_E, alpha=layer.bias_update_rate)
        layer.tokens_per_expert = None
    max_vio_L = load_LE.amax(-1) / mean_L1.squeeze(-1) - 1
    return dict(zip(counted, max_vio_L, strict=True))
