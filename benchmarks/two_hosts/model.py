"""A transformer with six matrices per layer and next to nothing else: 9.4 M parameters in 18 matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, scaled_dot_product_attention, silu

__all__ = ["SEQ_LEN", "Transformer", "batch"]

SEQ_LEN = 128


class _Layer(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        query, key, value = (
            project(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        mlp: Tensor = self.down(silu(self.up(self.mlp_norm(x))))
        return x + mlp


class Transformer(nn.Module):
    """Features in, features out: embeddings and heads would be AdamW's, which is not what is compared.

    Args:
        dim: Features.
        depth: Layers of six matrices.
        num_heads: Attention heads.
    """

    def __init__(self, dim: int = 512, depth: int = 3, num_heads: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(_Layer(dim, num_heads) for _ in range(depth)))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean squared error; ``inputs``, ``targets``: ``(batch, SEQ_LEN, dim)``."""
        return mse_loss(self.layers(inputs), targets)


def batch(rank: int, tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """A rank's inputs and targets, each ``(tokens // SEQ_LEN, SEQ_LEN, dim)``."""
    generator = torch.Generator().manual_seed(rank)
    inputs, targets = torch.randn(2, tokens // SEQ_LEN, SEQ_LEN, dim, generator=generator)
    return inputs, targets
