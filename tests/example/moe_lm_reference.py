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
        groups, size = layer.gate.num_groups, len(for_choice) // layer.gate.num_groups
        members = [range(g * size, (g + 1) * size) for g in range(groups)]
        if groups > 1:
            merits = [sum(sorted(for_choice[e] for e in group)[-2:]) for group in members]
            best = sorted(range(groups), key=lambda g: merits[g], reverse=True)[: layer.gate.top_k_groups]
            members = [members[g] for g in best]
        eligible = [e for group in members for e in group]
        chosen = sorted(eligible, key=lambda e: for_choice[e], reverse=True)[:top_k]
        total = sum(scores[e] for e in chosen)
        row = shared.down_proj.weight @ (F.silu(shared.gate_proj.weight @ token) * (shared.up_proj.weight @ token))
        for e in chosen:
            inner = F.silu(experts.gate_proj[e] @ token) * (experts.up_proj[e] @ token)
            row = row + scaling * scores[e] / total * (experts.down_proj[e] @ inner)
        rows.append(row)
    return torch.stack(rows)


def sequence_loss_reference(scores: Tensor, top_k: int) -> Tensor:
    """Of scores ``(B, T, E)``: equations 17 – 20 of arXiv 2412.19437, one expert at a time."""
    num_sequences, num_tokens, num_experts = scores.shape
    total = torch.zeros(())
    for b in range(num_sequences):
        rows = scores[b].tolist()
        best = [sorted(range(num_experts), key=row.__getitem__)[-top_k:] for row in rows]
        for i in range(num_experts):
            f = sum(i in chosen for chosen in best) * num_experts / (top_k * num_tokens)
            p = sum(scores[b, t, i] / scores[b, t].sum() for t in range(num_tokens)) / num_tokens
            total = total + f * p
    return total / num_sequences


def balanced_bias_reference(choices: list[Tensor], num_experts: int, rate: float) -> Tensor:
    """The biases after one update from zero, from all tokens' choices of one optimizer step."""
    loads = [sum(chosen.tolist().count(e) for chosen in choices) for e in range(num_experts)]
    mean = sum(loads) / num_experts
    signs = [(mean > load) - (mean < load) for load in loads]
    return torch.tensor([rate * (sign - sum(signs) / num_experts) for sign in signs])
