"""A parameter as a step sees it: the part of it that this process updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muon.local import local
from lightning_muon.partition import Range

__all__ = ["OwnedParameter", "Run"]


@dataclass(frozen=True)
class Run:
    """Adjacent elements of a parameter.

    Attributes:
        start, stop: Where they lie in what this process holds of the parameter, flattened.
        weight: `(stop - start,)`, to be updated in place; float32 where the parameter has master weights.
        gradient: `(stop - start,)`.
        state: The optimizer state of these elements, `(stop - start,)` each, to be updated in place.
    """

    start: int
    stop: int
    weight: Tensor
    gradient: Tensor
    state: Mapping[str, Tensor]


@dataclass(frozen=True)
class OwnedParameter:
    """A parameter with a gradient, of which this process updates something.

    Attributes:
        name: Its name.
        param: The parameter.
        state: Its optimizer state; the tensors hold the owned elements, one range after the other.
        ranges: The runs of elements that this process updates, ascending, within what it holds of the parameter: all
            of it, or its shard where the parameter is a ``DTensor``.
        group: Its parameter group.
    """

    name: str
    param: nn.Parameter
    state: dict[str, Any]
    ranges: Sequence[Range]
    group: Mapping[str, Any]

    def runs(self) -> list[Run]:
        """The owned elements. Call `write_back` with them when their weights are updated."""
        assert self.param.grad is not None
        weight, gradient = local(self.param).reshape(-1), local(self.param.grad).reshape(-1)
        held = {key: local(value).view(-1) for key, value in self.state.items() if isinstance(value, Tensor)}
        runs, offset = [], 0
        for start, stop in self.ranges:
            state = {key: value[offset : offset + stop - start] for key, value in held.items()}
            own = weight[start:stop]
            if "master_weight" in state:
                own = _follow_(state["master_weight"], own)
            runs.append(Run(start, stop, own, gradient[start:stop], state))
            offset += stop - start
        return runs

    def write_back(self, runs: Sequence[Run]) -> None:
        """Bring the weights of `runs` into the parameter, as far as they are no views of it."""
        param = local(self.param)
        if param.is_contiguous():
            if "master_weight" in self.state:
                flat = param.view(-1)
                for run in runs:
                    flat[run.start : run.stop] = run.weight
        else:  # a copy in the logical order, back through the strides
            param.copy_(torch.cat([run.weight for run in runs]).view_as(param))


def _follow_(master: Tensor, weight: Tensor) -> Tensor:
    """Where a weight is not what its master rounds to, somebody has set it (a loaded model, a clipped projection): the
    master takes it over, in place."""
    return torch.where(weight == master.to(weight.dtype), master, weight.to(master.dtype), out=master)
