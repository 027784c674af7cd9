"""The scale rules of Moonlight's Tables 1 and 8, from what `lightning_muon.Muon` has.

Its step is ``W ← W - lr·(0.2·√max(rows, cols)·O + λW)``. A group with ``f·lr`` and ``λ/f`` has the update f times as
large, and the decay as it was: r/0.2 for another RMS than 0.2, √(H/max(rows, cols)) for √H. `normalize_updates` does
what depends on the update itself, around the step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

import lightning_muon as lm
from benchmarks.claims.description import Run
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM
from examples.moe_lm.optim import ROUTER, is_auxiliary

USUAL_RMS = 0.2  # of scale="match_rms_adamw"


def factor(run: Run, shape: Sequence[int], hidden_size: int) -> float:
    """How many times the usual size the update of a matrix, or of each in a stack ``(..., rows, cols)``, has."""
    if run.scale_rule == "update_norm":
        return 1.0  # `normalize_updates` gives the size
    of_target = run.update_rms / USUAL_RMS
    if run.scale_rule == "baseline":
        return of_target * math.sqrt(hidden_size / max(shape[-2:]))
    return of_target


class ScaledMoELM(MoELM):
    """The example's model, with the optimizer of a run.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(
            ModelConfig(**run.model),
            optimizer=run.optimizer,
            lr=run.lr,
            adamw_lr=run.adamw_lr,
            weight_decay=run.weight_decay,
            orthogonalization=run.orthogonalization,
            router_optimizer=run.router_optimizer,
        )
        self.run = run

    @override
    def make_optimizer(self) -> Optimizer:
        """The example's own where the scale is the usual one; elsewhere a group for each factor on it."""
        run = self.run
        if (run.update_rms, run.scale_rule) == (USUAL_RMS, "adjusted"):
            return super().make_optimizer()
        groups: dict[float | None, dict[str, Any]] = {}
        for name, param in self.named_parameters():
            f = None if self._is_adamws(name, param) else factor(run, param.shape, self.config.hidden_size)
            groups.setdefault(f, self._group(f))["params"].append((name, param))
        optimizer = lm.Muon(
            list(groups.values()), betas=(0.9, 0.95), orthogonalization=run.orthogonalization, module=self
        )
        if run.scale_rule == "update_norm":
            normalize_updates(optimizer, run.update_rms)
        return optimizer

    def _is_adamws(self, name: str, param: nn.Parameter) -> bool:
        is_router = re.search(ROUTER, name) is not None
        return is_auxiliary(name, param) or (is_router and self.run.router_optimizer == "adamw")

    def _group(self, f: float | None) -> dict[str, Any]:
        """An empty group for AdamW, or for Muon with a factor."""
        run = self.run
        if f is None:
            lr = run.lr if run.adamw_lr is None else run.adamw_lr
            return {"params": [], "algorithm": "adamw", "lr": lr, "weight_decay": run.weight_decay}
        return {"params": [], "algorithm": "muon", "lr": f * run.lr, "weight_decay": run.weight_decay / f}


def normalize_updates(optimizer: lm.Muon, rms: float) -> None:
    """Gives every matrix that Muon trains an update of exactly this RMS, by undoing what differs after each step.

    The update is read off the weights, ``((1 - lr·λ)·W₀ - W₁)/lr``, so it is for float32 weights on one process. A
    matrix that the step has left alone, an expert without tokens for instance, stays as it is.

    Args:
        optimizer: Its parameters are matrices ``(rows, cols)``, or stacks of them; not fused ones.
        rms: The RMS of the update before the learning rate.
    """
    before: dict[Tensor, Tensor] = {}

    def remember(*_: Any) -> None:
        before.update({p: p.detach().clone() for group in _of_muon(optimizer) for p in group["params"]})

    @torch.no_grad()
    def rescale(*_: Any) -> None:
        for group in _of_muon(optimizer):
            lr = float(group["lr"])
            for param in group["params"]:
                start = before.pop(param)
                decayed = start * (1 - lr * group["weight_decay"])
                step = decayed - param
                norm = torch.linalg.matrix_norm(step, keepdim=True)
                wanted = lr * rms * math.sqrt(step.shape[-2] * step.shape[-1])
                has_moved = (param != start).any(-1, keepdim=True).any(-2, keepdim=True)  # an idle one is not decayed
                param.copy_(torch.where(has_moved, decayed - step * (wanted / norm), param))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(rescale)


def _of_muon(optimizer: lm.Muon) -> list[dict[str, Any]]:
    return [group for group in optimizer.param_groups if group["algorithm"] == "muon"]
