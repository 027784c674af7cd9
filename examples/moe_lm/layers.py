"""RMSNorm, rotary positions and SwiGLU.

Shape suffixes: B batch, T time (tokens), A heads, D width of a head, H hidden size, I inner width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last dimension, in fp32 whatever the input's dtype.

    Args:
        size: length of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    @override
    def forward(self, x_BTH: Tensor) -> Tensor:
        """``(..., size)`` to the same shape and dtype."""
        x_fp32 = x_BTH.float()
        x_fp32 = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x_fp32.to(x_BTH.dtype)


def rotation(num_positions: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Complex numbers of modulus one, ``(T, D/2)``: position ``t`` turns the i-th pair by
    ``t * theta ** (-2 i / head_dim)``, i = 0 … head_dim/2 - 1.

    Computed anew in each forward: a cached buffer would be rounded by bf16-true and broadcast by DDP, and the table
    costs microseconds.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=device), frequency)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x_BATD: Tensor, rotation_TD: Tensor) -> Tensor:
    """Turns each pair ``(x[2i], x[2i+1])`` by its position's i-th angle (DeepSeek's interleaved layout)."""
    pairs = torch.view_as_complex(x_BATD.float().contiguous().view(*x_BATD.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation_TD).flatten(-2).to(x_BATD.dtype)


class SwiGLU(nn.Module):
    """Gated feed-forward ``down(silu(gate(x)) * up(x))``.

    Args:
        hidden_size: H, width of input and output.
        intermediate_size: I, inner width.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    @override
    def forward(self, x_BTH: Tensor) -> Tensor:
        """``(..., H)`` to the same shape."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x_BTH)) * self.up_proj(x_BTH))
        return out
