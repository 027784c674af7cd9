"""What is added up of each router's choices, on its device, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muon.experts.measures import of_chosen, probabilities, router_entropy, routing_confidence

__all__ = ["Counted", "add_routing", "count_routing", "new_sums", "sums_size"]

# How scores may follow from what a router returns.
_SCORINGS: tuple[Callable[[Tensor], Tensor], ...] = (lambda x: x, lambda x: x.softmax(-1), torch.sigmoid)
# Mean difference of the chosen experts' weights, each token's made to sum 1. What rounding to bf16 makes is 0.002.
_SAME_WEIGHTS = 0.01


def sums_size(num_experts: int) -> int:
    """Numbers per layer: tokens of each expert, choices of no expert, tokens with scores, their entropy, confidence."""
    return num_experts + 4


def new_sums(num_experts: int, device: torch.device) -> Tensor:
    """Where nothing has been counted yet. In float64, which holds any number of tokens exactly."""
    return torch.zeros(sums_size(num_experts), dtype=torch.float64, device=device)


# An operator of its own is not looked into by torch.compile, so that what it does is decided when it runs: a compiled
# layer may run again in backward, too.
@torch.library.custom_op(
    "lightning_muon::count_routing",
    mutates_args=("sums",),
    schema="(Tensor(a!) sums, Tensor experts, Tensor? scores, Tensor? weights, int num_experts) -> ()",
)
def count_routing(
    sums: Tensor, experts: Tensor, scores: Tensor | None, weights: Tensor | None, num_experts: int
) -> None:
    """Add one forward of a router, unless it is computed again for a backward pass (activation checkpointing).

    Args:
        sums: `(sums_size(E),)`, as `new_sums` makes it.
        experts: The chosen experts, `(..., K)`; numbers outside 0 … E - 1 stand for no expert.
        scores: Scores or logits, `(..., E)`.
        weights: The weights of the chosen experts, `(..., K)`; `None`: the scores are scores.
        num_experts: E.
    """
    if torch._C._current_graph_task_id() == -1:  # not within a backward; so does torch.utils.checkpoint know its own
        add_routing(sums, experts, scores, weights, num_experts)


def add_routing(sums: Tensor, experts: Tensor, scores: Tensor | None, weights: Tensor | None, num_experts: int) -> None:
    """The same, wherever it is called. Nothing in it asks the device for a value, which would wait for the device."""
    experts = experts.long()
    chosen = torch.where((experts >= 0) & (experts < num_experts), experts, num_experts).flatten()
    # not bincount, which asks how large its result is
    sums[: num_experts + 1].scatter_add_(0, chosen, torch.ones_like(chosen, dtype=sums.dtype))
    if scores is not None:
        sums[num_experts + 1 :] += _of_scores(scores.float(), experts, None if weights is None else weights.float())


def _of_scores(returned: Tensor, experts: Tensor, weights: Tensor | None) -> Tensor:
    """Tokens with scores, and sums of their entropy and confidence: `(3,)`.

    The scores are those from which the weights follow: of none, softmax and sigmoid the one under which the chosen
    experts' scores are in proportion to their weights. Where they are in proportion under none, there are no scores.
    """
    if weights is None:
        return _sums(returned, experts)
    candidates = torch.stack([scoring(returned) for scoring in _SCORINGS])
    chosen = of_chosen(candidates, experts.expand(len(candidates), *experts.shape))
    differences = (probabilities(chosen) - probabilities(weights)).abs().mean(-1)
    # a token that no expert takes has no weights to compare
    smallest, which = differences.nan_to_num(0).flatten(1).mean(-1).min(0)
    return _sums(candidates.index_select(0, which[None])[0], experts).where(smallest < _SAME_WEIGHTS, 0)


def _sums(scores: Tensor, experts: Tensor) -> Tensor:
    p = probabilities(scores)
    per_token = [torch.ones_like(p[..., 0]), router_entropy(p), routing_confidence(p, experts)]
    return torch.stack([one.sum(dtype=torch.float64) for one in per_token])


@dataclass(frozen=True)
class Counted:
    """What was counted of a layer, on the host.

    Attributes:
        tokens: Tokens per expert, `(E,)`, float64.
        router_entropy: Mean over the tokens, or `None` where the scores are not known.
        routing_confidence: The same.
    """

    tokens: Tensor
    router_entropy: float | None
    routing_confidence: float | None

    @classmethod
    def of(cls, sums: Tensor) -> Counted:
        """Take the sums of all processes apart."""
        num_experts = len(sums) - sums_size(0)
        tokens, (scored, entropy, confidence) = sums[:num_experts], sums[num_experts + 1 :].tolist()
        if not scored:
            return cls(tokens, None, None)
        return cls(tokens, entropy / scored, confidence / scored)
