"""Which optimizer computes which parameter, and the learning rate over time."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

import lightning_muon as lm

OptimizerName = Literal["muon", "adamw"]

ROUTER = r"\.mlp\.gate\.weight$"  # the router alone, no expert's gate_proj


def is_auxiliary(name: str, parameter: nn.Parameter) -> bool:
    """Embedding, head and vectors: what is AdamW's business under either optimizer."""
    return parameter.ndim < 2 or name.split(".")[-2] in ("embed_tokens", "lm_head")


def build_optimizer(
    module: nn.Module,
    *,
    optimizer: OptimizerName,
    lr: float,
    adamw_lr: float | None,
    weight_decay: float,
    orthogonalization: str,
    router_optimizer: Literal["muon", "adamw"],
) -> Optimizer:
    """One optimizer for every parameter of ``module``.

    Under ``"adamw"`` the same class computes AdamW everywhere, so that strategies, checkpoints and monitors are the
    same for both and only the update differs. ``adamw_lr`` then is the embedding's, head's and norms' rate: one
    rate for everything holds AdamW back on small models of this kind, and comparing Muon with that would flatter Muon.
    """
    if optimizer not in ("muon", "adamw"):
        raise ValueError(f"MoELM: optimizer is 'muon' or 'adamw', got {optimizer!r}")
    common: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.95)}
    if optimizer == "muon":
        rules = [lm.Rule(ROUTER, algorithm="adamw")] if router_optimizer == "adamw" else []
        return lm.Muon(module, adamw_lr=adamw_lr, orthogonalization=orthogonalization, rules=rules, **common)
    named = list(module.named_parameters())
    matrices = [(name, p) for name, p in named if not is_auxiliary(name, p)]
    others = [(name, p) for name, p in named if is_auxiliary(name, p)]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "algorithm": "adamw", "lr": lr},
        {"params": others, "algorithm": "adamw", "lr": lr if adamw_lr is None else adamw_lr},
    ]
    return lm.Muon(groups, **common)


def warmup_cosine(step: int, num_steps: int, warmup_fraction: float) -> float:
    """Factor on the learning rate at optimizer step ``step`` (from 0) of ``num_steps``: up to 1, then down to 0.1."""
    warmup = max(1, round(warmup_fraction * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    return 0.55 + 0.45 * math.cos(math.pi * progress)
