"""Slow and readable: what the example's layers compute, one token at a time."""

from __future__ import annotations

import cmath

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.moe_lm.moe import MixtureOfExperts


def rotate_reference(x: Tensor, theta: float) -> Tensor:
    """``(B, A, T, D)``: every pair of neighbours as a complex number, turned by its angle."""
    out = x.clone()
    width = x.shape[-1]
    for t in range(x.shape[-2]):
        for i in range(width // 2):
            turn = cmath.exp(1j * t * theta ** (-2 * i / width))
            real, imag = x[..., t, 2 * i], x[..., t, 2 * i + 1]
            out[..., t, 2 * i] = real * turn.real - imag * turn.imag
            out[..., t, 2 * i + 1] = real * turn.imag + imag * turn.real
    return out


def moe_reference(layer: MixtureOfExperts, x: Tensor, top_k: int, scaling: float) -> Tensor:
    """``(N, H)``: for every token, its experts one by one."""
    experts, shared, rows = layer.experts, layer.shared_experts, []
    for token in x:
        scores = torch.sigmoid(layer.gate.weight @ token)
        for_choice = (scores.detach() + layer.gate.e_score_correction_bias).tolist()
        chosen = sorted(range(len(for_choice)), key=lambda e: for_choice[e], reverse=True)[:top_k]
        total = sum(scores[e] for e in chosen)
        row = shared.down_proj.weight @ (F.silu(shared.gate_proj.weight @ token) * (shared.up_proj.weight @ token))
        for e in chosen:
            inner = F.silu(experts.gate_proj[e] @ token) * (experts.up_proj[e] @ token)
            row = row + scaling * scores[e] / total * (experts.down_proj[e] @ inner)
        rows.append(row)
    return torch.stack(rows)
