"""Any optimizer of torch, as the monitors see it: a step is the difference of the weights before and after."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muon.matrices import MatrixKey
from lightning_muon.muon_step import UpdateRecord
from lightning_muon.param_groups import Router
from lightning_muon.partition import Alone, Range
from lightning_muon.routes import Route
from lightning_muon.watching import Watch

__all__ = ["ObservedOptimizer"]


class ObservedOptimizer:
    """An optimizer that does not measure itself, so that a baseline has the same curves as ``Muon``.

    Its parameters are read as the matrices that ``Muon`` would see in them. The update of ``W₀ → W₁`` is
    ``((1 - lr·λ)·W₀ - W₁)/lr``, where λ is the weight decay of those optimizers that decay the weight itself
    (``torch.optim.AdamW`` and what has ``decoupled_weight_decay``, ``torch.optim.Muon`` and ``Adafactor``); what others
    do is all update.
    That is as exact as the difference of two weights can be: with 16-bit weights, hardly.

    Processes that each have all parameters (DDP) each do all the work, and agree.

    Attributes:
        is_watched: Whether the last step was watched.

    Args:
        optimizer: The optimizer.
        module: The module whose parameters it trains; names are the module's.

    Raises:
        ValueError: The parameters are sharded, so that no process has a whole matrix.
    """

    def __init__(self, optimizer: Optimizer, module: nn.Module) -> None:
        self.optimizer = optimizer
        self.partition = Alone()
        self.watch = Watch()
        self.momentum_spectra: Mapping[MatrixKey, Tensor] = {}
        self.last_grad_norms: dict[str, Tensor] = {}
        self.state: Any = optimizer.state
        trained = {param for group in optimizer.param_groups for param in group["params"]}
        pairs = [(name, param) for name, param in module.named_parameters() if param in trained]
        if sharded := [name for name, param in pairs if hasattr(param, "to_local")]:
            raise ValueError(
                f"{sharded[0]!r} is sharded (DTensor), and {type(optimizer).__name__} cannot be measured then: the"
                " monitors see sharded weights through lightning_muon.Muon only. For an AdamW baseline give Muon groups"
                " with 'algorithm': 'adamw'; it computes torch's AdamW."
            )
        routed, self._routes = Router((), module).split({"params": pairs, "algorithm": "adamw"})
        names = {param: name for group in routed for name, param in group["params"]}
        self.param_groups: list[dict[str, Any]] = [
            {
                "params": [param for param in group["params"] if param in names],
                "param_names": [names[param] for param in group["params"] if param in names],
                "algorithm": type(optimizer).__name__,
                "name": str(number),
                "lr": 0.0,
            }
            for number, group in enumerate(optimizer.param_groups)
        ]
        self._before: dict[str, Tensor] = {}
        self._decays: dict[str, float] = {}
        self._records: list[UpdateRecord] = []
        self._is_watching = self.is_watched = False
        self._handle = optimizer.register_step_post_hook(self._after_step)

    @property
    def routes(self) -> Mapping[str, Route]:
        """How each parameter is read as matrices."""
        return self._routes

    def local_ranges(self, name: str, param: Tensor) -> Sequence[Range]:
        """All elements."""
        return [(0, param.numel())]

    @property
    def update_records(self) -> Sequence[UpdateRecord]:
        """The updates of the last step that was watched; none of parameters without a gradient."""
        return self._records

    def close(self) -> None:
        """Leave the optimizer as it was."""
        self._handle.remove()
        self.forget()

    def forget(self) -> None:
        """Drop what was kept of the weights and of the step."""
        self._before, self._records = {}, []
        self._is_watching = self.is_watched = False

    def _after_step(self, *_: Any) -> None:
        if self._is_watching:
            self._records = self._differences()
            self._before, self._is_watching, self.is_watched = {}, False, True

    @torch.no_grad()
    def watch_next_step(self, names: Collection[str] | None = None) -> None:
        """Keep a copy of the weights; call it just before the optimizer's step.

        Args:
            names: Of these parameters; ``None`` is all.
        """
        self._records = []
        asked = [(name, param) for name, param, _ in self._parameters() if names is None or name in names]
        # what has no gradient is left alone by the optimizer, decay and all
        self._before = {name: param.detach().clone() for name, param in asked if param.grad is not None}
        self._is_watching, self.is_watched = True, False
        self.watch.rates = {}
        for group, own in zip(self.optimizer.param_groups, self.param_groups, strict=True):
            self.watch.rates[own["name"]] = float(group["lr"])
            self._decays[own["name"]] = float(group["weight_decay"]) if _is_decoupled(self.optimizer, group) else 0.0

    def _parameters(self) -> list[tuple[str, Tensor, str]]:
        return [
            (name, param, group["name"])
            for group in self.param_groups
            for name, param in zip(group["param_names"], group["params"], strict=True)
        ]

    @torch.no_grad()
    def _differences(self) -> list[UpdateRecord]:
        records = []
        for name, param, group in self._parameters():
            rate = self.watch.rates[group]
            if name in self._before and rate:
                update = (self._before[name].double() * (1 - rate * self._decays[group]) - param.detach()) / rate
                layout = self._routes[name].layout
                matrices = [update] if layout is None else layout.matrices(update)
                squares = torch.stack([matrix.square().sum() for matrix in matrices])
                keys = tuple((name, number) for number in range(len(matrices)))
                records.append(UpdateRecord(keys, squares, None, None, None))
        return records


_DECAYING = (torch.optim.AdamW, torch.optim.Muon, torch.optim.Adafactor)


def _is_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay")) or isinstance(optimizer, _DECAYING)
