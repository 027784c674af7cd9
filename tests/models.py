"""Small models with awkward shapes: sizes that no number of ranks divides, fused and stacked parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu


class AwkwardModel(nn.Module):
    """Square, tall, wide, 1-row and 1-column matrices, a fused projection, experts, a convolution, vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(17, 21)
        self.square = nn.Linear(21, 21)
        self.tall = nn.Linear(21, 63, bias=False)
        self.wide = nn.Linear(63, 13)
        self.qkv = nn.Linear(13, 39, bias=False)
        self.conv = nn.Conv1d(13, 6, 3, padding=1)
        self.experts_up = nn.Parameter(torch.randn(5, 11, 6) * 0.3)
        self.one_row = nn.Linear(11, 1)
        self.one_col = nn.Linear(1, 9)
        self.norm = nn.LayerNorm(9)
        self.lm_head = nn.Linear(9, 17)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        x = silu(self.wide(silu(self.tall(self.square(x)))))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = torch.tanh(q * k) + v
        x = self.conv(x.mT).mT
        x = torch.einsum("bti,eoi->bto", silu(x), self.experts_up)
        x = self.one_col(torch.tanh(self.one_row(x)))
        return self.lm_head(self.norm(x))

    def loss(self, tokens: Tensor) -> Tensor:
        return cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def awkward_model(seed: int = 0) -> AwkwardModel:
    torch.manual_seed(seed)
    return AwkwardModel()


def token_batches(num_batches: int, batch_size: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 17, (batch_size, 8), generator=generator) for _ in range(num_batches)]
