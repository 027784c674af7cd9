"""The example trained on one process without a Trainer, to look at what its matrices feed to the orthogonalisation."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

import lightning_muon as lm
from examples.moe_lm.data import TextDataModule
from examples.moe_lm.model import MoELM, next_token_nll, validation_figures
from examples.moe_lm.train_fabric import endless
from lightning_muon.matrices import MatrixKey

__all__ = ["matrices_of", "recorded_momentum", "train_example"]

AfterStep = Callable[[int, lm.Muon], None]


def train_example(
    num_steps: int, *, seed: int, after_step: AfterStep, stop_after: int | None = None, **model_options: Any
) -> float:
    """Train as `make demo` does: windows of 128 tokens, 16 a step, the same learning rates and clipping.

    Args:
        num_steps: Optimizer steps, the learning rate's schedule included.
        seed: Of weights and windows.
        after_step: Called after every step, from 1, with the gradients still there.
        stop_after: End sooner.
        model_options: Arguments of `MoELM`.

    Returns:
        Bits per byte on the validation files.
    """
    torch.manual_seed(seed)
    data = TextDataModule(batch_size=16, window_seed=seed)
    module = MoELM(**{"lr": 8e-3, "adamw_lr": 1.6e-2, **model_options})
    optimizer = module.make_optimizer()
    assert isinstance(optimizer, lm.Muon)
    scheduler = module.make_scheduler(optimizer, num_steps)
    batches = endless(data.train_dataloader())
    for step in range(1, (stop_after or num_steps) + 1):
        batch = next(batches)
        loss = next_token_nll(module(batch[:, :-1]), batch[:, 1:]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        module.balance_experts()
        optimizer.step()
        after_step(step, optimizer)
        scheduler.step()
        optimizer.zero_grad()
    module.eval()
    with torch.no_grad():
        losses = [next_token_nll(module(batch[:, :-1]), batch[:, 1:]).flatten() for batch in data.val_dataloader()]
    return validation_figures(torch.cat(losses).mean())["val/bpb"].item()


def recorded_momentum(at: Collection[int]) -> dict[int, list[tuple[str, Tensor]]]:
    """What Newton–Schulz gets at some steps of that training, of 600.

    Args:
        at: Optimizer steps, from 1.

    Returns:
        For each step the matrices with their names, `(1-μ)G + μM` in float32; without those that rest.
    """
    recorded: dict[int, list[tuple[str, Tensor]]] = {}

    def keep(step: int, optimizer: lm.Muon) -> None:
        if step in at:
            recorded[step] = [(f"{name}[{n}]", fed) for (name, n), fed in matrices_of(optimizer).items() if fed.any()]

    train_example(600, seed=1, after_step=keep, stop_after=max(at))
    return recorded


def matrices_of(optimizer: lm.Muon) -> dict[MatrixKey, Tensor]:
    """What was orthogonalised in the last step, as long as the gradients are there."""
    found: dict[MatrixKey, Tensor] = {}
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            layout = optimizer.routes[name].layout
            if group["algorithm"] == "muon" and layout is not None:
                buffer, mu = optimizer.state[param]["momentum_buffer"].view_as(param), group["momentum"]
                fed = (1 - mu) * param.grad + mu * buffer if group["nesterov"] else buffer
                found |= {(name, number): matrix.clone() for number, matrix in enumerate(layout.matrices(fed))}
    return found
