"""Even loads for the experts: by a bias that does without an auxiliary loss, and by DeepSeek-V3's small loss beside it.

Shape suffixes: B sequences, T tokens of each, E routed experts, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from .moe import MixtureOfExperts


def count_tokens(experts: Tensor, num_experts: int) -> Tensor:
    """How often each expert is chosen, ``(E,)`` int64. Unlike ``bincount`` this does not wait for a GPU."""
    chosen = experts.flatten()
    return torch.zeros(num_experts, dtype=torch.int64, device=chosen.device).scatter_add(
        0, chosen, torch.ones_like(chosen)
    )


def sequence_loss(scores_BTE: Tensor, top_k: int) -> Tensor:
    """DeepSeek-V3's sequence-wise balancing loss (arXiv 2412.19437, eq. 17 – 20), its factor alpha left out; a scalar.

    ``mean over sequences of sum_i f_i P_i``; ``f_i`` is expert i's share among the ``top_k`` best scores of each token,
    times E, and ``P_i`` the mean over the sequence's tokens of expert i's share of the scores. 1 where either is even.
    The best scores are taken without the bias and the groups that take part in the choice.
    """
    num_experts, best = scores_BTE.shape[-1], scores_BTE.detach().topk(top_k, dim=-1).indices.flatten(1)
    counts_BE = torch.zeros(len(best), num_experts, device=best.device)
    counts_BE = counts_BE.scatter_add(1, best, torch.ones_like(best, dtype=counts_BE.dtype))
    f_BE = counts_BE * (num_experts / best.shape[1])
    p_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
    return (f_BE * p_BE).sum(-1).mean()


def is_recomputing() -> bool:
    """Whether this forward runs within a backward pass: activation checkpointing runs it a second time."""
    return torch._C._current_graph_task_id() != -1  # what torch.utils.checkpoint itself asks


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


def take_sequence_losses(layers: Mapping[str, MixtureOfExperts]) -> Tensor | None:
    """The sum of what the layers' last forwards have left of the auxiliary loss, alpha included; ``None`` if nothing.

    Taken away from the layers, since each holds its forward's graph.
    """
    losses = []
    for layer in layers.values():
        if layer.sequence_loss is not None:
            losses.append(layer.sequence_loss)
            layer.sequence_loss = None
    return torch.stack(losses).sum() if losses else None
