"""Small attention modules of every kind, and ways to plant a head with large logits."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

import lightning_muon as lm
from examples.moe_lm.attention import build_attention
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.layers import rotation

HEADS = 4
SIZES = {"hidden_size": 20, "num_attention_heads": HEADS, "head_dim": 6, "kv_lora_rank": 10}
SIZES |= {"qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 3}


class WithExample(nn.Module):
    """The attention of the example model."""

    def __init__(self, **sizes) -> None:
        super().__init__()
        self.config = ModelConfig(**{**SIZES, **sizes})
        self.self_attn = build_attention(self.config)
        self.head = nn.Linear(20, 3)

    @override
    def forward(self, x_BTH: Tensor) -> Tensor:
        turn = rotation(x_BTH.shape[1], self.config.rotated_dim, 100.0, x_BTH.device)
        return self.head(self.self_attn(x_BTH, turn))


class WithBias(nn.Module):
    """Plain multi-head attention whose projections have biases."""

    def __init__(self, kernel=F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.num_heads, self.kernel = HEADS, kernel
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(20, 24) for _ in range(3))

    @override
    def forward(self, x_BTH: Tensor) -> Tensor:
        q, k, v = (
            projection(x_BTH).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.kernel(q, k, v).transpose(1, 2).flatten(-2)


class Fused(nn.Module):
    """Queries, keys and values from one projection."""

    description = lm.AttentionHeads.grouped_query(HEADS, 6, query="qkv", key="qkv", key_start=24)

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(20, 72)

    @override
    def forward(self, x_BTH: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BTH).unflatten(-1, (3, HEADS, 6)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)


def build(kind: str, seed: int = 0) -> nn.Module:
    """``"mha"``, ``"gqa"``, ``"mqa"``, ``"mla"``, ``"bias"`` or ``"fused"``."""
    torch.manual_seed(seed)
    if kind in ("bias", "fused"):
        return nn.ModuleDict({"self_attn": WithBias() if kind == "bias" else Fused()})["self_attn"]
    groups = {"mha": HEADS, "gqa": 2, "mqa": 1, "mla": HEADS}
    return WithExample(attention="mla" if kind == "mla" else "gqa", num_key_value_heads=groups[kind])


def describe(name: str, module: nn.Module) -> lm.AttentionHeads | None:
    """What ``heads=`` needs for ``Fused``."""
    return module.description if isinstance(module, Fused) else None


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(3, 9, 20, generator=torch.Generator().manual_seed(seed))


def query_rows(kind: str, head: int) -> tuple[str, slice]:
    """The projection of a head's queries, and its rows, counted by hand."""
    width = 9 if kind == "mla" else 6
    name = {"bias": "q_proj", "fused": "qkv"}.get(kind, "self_attn.q_proj")
    return name, slice(head * width, (head + 1) * width)


@torch.no_grad()
def plant(model: nn.Module, kind: str, x: Tensor, head: int = 2, largest: float = 300.0) -> None:
    """Make the largest logit of a head that."""
    name, rows = query_rows(kind, head)
    projection = model.get_submodule(name)
    factor = largest / logits_of(model, x)[head]
    for param in projection.parameters():
        param[rows] *= factor


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> list[float]:
    """S of each head, in float64 and one pair of positions after the other; kernels that take no mask only."""
    calls = []

    def recorded(query, key, *args, **kwargs):
        calls.append((query, key, kwargs.get("is_causal", False)))
        return original(query, key, *args, **kwargs)

    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = recorded
    kernels = [part for part in model.modules() if getattr(part, "kernel", None) is original]
    for part in kernels:
        part.kernel = recorded
    was_training = model.training
    model.eval()  # whoever watches does not count this
    try:
        model(x)
    finally:
        model.train(was_training)
        F.scaled_dot_product_attention = original
        for part in kernels:
            part.kernel = original
    (query, key, is_causal), *_ = calls
    return slow_max_logits(query, key, lambda _b, _h, i, j: j <= i or not is_causal)


def slow_max_logits(query: Tensor, key: Tensor, sees, scale: float | None = None) -> list[float]:
    """One logit after the other, in float64; ``(B, heads, T, width)``."""
    batch, heads, queries, width = query.shape
    shared_by = heads // key.shape[1]
    found = [-float("inf")] * heads
    for b, h, i, j in itertools.product(range(batch), range(heads), range(queries), range(key.shape[2])):
        if sees(b, h, i, j):
            product = (query[b, h, i].double() * key[b, h // shared_by, j].double()).sum().item()
            found[h] = max(found[h], product * (width**-0.5 if scale is None else scale))
    return found
