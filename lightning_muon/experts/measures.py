"""What tokens per expert and a router's scores say. Pure functions; E is the number of experts of one layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "dead_experts",
    "load_entropy",
    "load_fractions",
    "max_vio",
    "min_load",
    "of_chosen",
    "probabilities",
    "router_entropy",
    "routing_confidence",
]


def load_fractions(tokens: Tensor) -> Tensor:
    """Each expert's share of the routed tokens.

    Args:
        tokens: Tokens per expert, `(E,)`, not all 0. A token that goes to K experts counts K times.

    Returns:
        `(E,)`, float64, 0 … 1, of sum 1. Cost: O(E), as of all measures of loads.
    """
    return tokens.double() / tokens.double().sum()


def max_vio(tokens: Tensor) -> float:
    """How far the busiest expert is above the mean: `(max - mean)/mean` of the tokens per expert.

    0 is perfect balance, E - 1 all tokens at one expert (E/K - 1 where each token takes K different experts). Without
    unit. Source: MaxVio of Wang et al., arXiv 2408.15664, §4.1.

    Args:
        tokens: Tokens per expert, `(E,)`, not all 0.
    """
    mean = tokens.double().mean()
    return ((tokens.max() - mean) / mean).item()


def dead_experts(tokens: Tensor) -> float:
    """The share of experts without a token, 0 … 1.

    Args:
        tokens: Tokens per expert, `(E,)`.
    """
    return (tokens == 0).double().mean().item()


def load_entropy(tokens: Tensor) -> float:
    """`-Σ f ln f / ln E` of the load fractions f: 1 is an even load, 0 all tokens at one expert.

    `E ** load_entropy` is the number of evenly used experts with the same entropy.

    Args:
        tokens: Tokens per expert, `(E,)`, not all 0.
    """
    return _normalised_entropy(load_fractions(tokens)).item()


def min_load(tokens: Tensor) -> float:
    """The tokens of the least used expert relative to the mean expert's, 0 … 1: 1 is an even load.

    Args:
        tokens: Tokens per expert, `(E,)`, not all 0.
    """
    return (tokens.min() / tokens.double().mean()).item()


def probabilities(scores: Tensor) -> Tensor:
    """A router's scores over their sum: what they were, where softmax has made them. Of sigmoid scores it is what the
    balance loss of DeepSeek-V3 uses (arXiv 2412.19437, equation 19).

    Args:
        scores: Scores that are not negative, `(..., E)`; logits are not scores.

    Returns:
        The same shape and dtype.
    """
    return scores / scores.sum(-1, keepdim=True)


def router_entropy(p: Tensor) -> Tensor:
    """How undecided the router is about each token: `-Σ p ln p / ln E`.

    1: all experts look the same to it. 0: it sees one.

    Args:
        p: Probabilities of the experts, `(..., E)`.

    Returns:
        `(...)`, of the same dtype, 0 … 1. Cost: two passes over p.
    """
    return _normalised_entropy(p)


def routing_confidence(p: Tensor, experts: Tensor) -> Tensor:
    """The share of each token's probability that is on the experts chosen for it: K/E if all are alike, up to 1.

    Args:
        p: Probabilities of the experts, `(..., E)`.
        experts: The chosen experts, `(..., K)`, int64. Numbers outside 0 … E - 1 stand for no expert.

    Returns:
        `(...)`, of the same dtype.
    """
    return of_chosen(p, experts).sum(-1)


def of_chosen(p: Tensor, experts: Tensor) -> Tensor:
    """What is the chosen experts', 0 where no expert is: `(..., E)` and `(..., K)` to `(..., K)`."""
    num_experts = p.shape[-1]
    is_expert = (experts >= 0) & (experts < num_experts)
    return p.gather(-1, experts.clamp(0, num_experts - 1)) * is_expert


def _normalised_entropy(p: Tensor) -> Tensor:
    entropy = torch.special.entr(p).sum(-1)
    return entropy / math.log(p.shape[-1]) if p.shape[-1] > 1 else torch.ones_like(entropy)
