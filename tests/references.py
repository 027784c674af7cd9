"""Slow and obvious versions of the maths, to compare with."""

from __future__ import annotations

import math

import torch


def newton_schulz(matrix, steps, safety=1.0):
    """One 2-D matrix, float64, no batching, no transposition: the equations as printed."""
    x = matrix.double()
    norm = x.norm()
    if norm == 0:
        return x
    x = x / (norm * safety)
    for a, b, c in steps:
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return x


def polar_factor(matrix):
    """``UVᵀ`` from the singular value decomposition."""
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vh


class MoonlightMuon:
    """Moonlight's equations 1, 2 and 4 (arXiv 2502.16982) on one matrix, in float64.

    ``M ← μM + G``; ``N = G + μM`` (or ``M``); ``O = NewtonSchulz5(N)``;
    ``W ← W - η(0.2·√max(A, B)·O + λW)``. The weight is rounded to its own dtype after each step.
    """

    def __init__(
        self, weight, lr, weight_decay=0.1, momentum=0.95, nesterov=True, steps=((3.4445, -4.7750, 2.0315),) * 5
    ):
        self.weight, self.lr, self.weight_decay = weight.clone(), lr, weight_decay
        self.mu, self.nesterov, self.steps = momentum, nesterov, steps
        self.momentum = torch.zeros_like(weight, dtype=torch.float64)

    def step(self, gradient):
        g = gradient.double()
        self.momentum = self.mu * self.momentum + g
        fed = g + self.mu * self.momentum if self.nesterov else self.momentum
        update = 0.2 * math.sqrt(max(fed.shape)) * newton_schulz(fed, self.steps)
        weight = self.weight.double()
        self.weight = (weight - self.lr * (update + self.weight_decay * weight)).to(self.weight.dtype)


def relative_error(actual, expected):
    """``‖a - e‖_F / ‖e‖_F``."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def matrix_with_spectrum(rows, cols, sigma, seed=0):
    """A matrix with the given singular values, float64."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, len(sigma), dtype=torch.float64, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(cols, len(sigma), dtype=torch.float64, generator=generator))
    return u @ torch.diag(torch.as_tensor(sigma, dtype=torch.float64)) @ v.T
