"""The ways to train that are compared: AdamW under DDP, ``muon_zero1``, and what torch itself offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import lightning_muon as lm
from lightning_muon.sharding.zero1 import Zero1

__all__ = [
    "LR",
    "VARIANTS",
    "Task",
    "Training",
    "matrices",
    "orthogonalized_by_us",
    "others",
    "torch_iteration",
    "train_under_ddp",
]

LR = 1e-4


@dataclass(frozen=True)
class Task:
    """What every variant does.

    Attributes:
        make_model: Makes the model; the same weights at every call.
        inputs, targets: This rank's batch.
        iteration_dtype: All variants that let one choose orthogonalise by ``lightning_muon.orthogonalize`` in this
            dtype, so that they differ in communication and in who does what, not in arithmetic. ``None`` leaves
            each its own.
    """

    make_model: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    iteration_dtype: torch.dtype | None


@dataclass
class Training:
    """A variant at work on this rank.

    Attributes:
        step: A whole training step.
        module: Whose ``state_dict()`` are the weights.
        replicated: Whether every rank has all weights, which must then be equal.
        owned: The matrices that this rank orthogonalises, if the variant can tell.
        gradients, update: The two halves of ``step``, where they can be told apart: all up to averaged gradients, and
            the optimizer's step.
    """

    step: Callable[[], None]
    module: nn.Module
    replicated: bool = True
    owned: list[Tensor] = field(default_factory=list)
    gradients: Callable[[], None] | None = None
    update: Callable[[], None] | None = None

    def checksum(self) -> float:
        """The sum of all weights that this rank holds: read them, so that none can still be on its way."""
        weights = self.module.state_dict().values()
        local = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights)
        return sum(weight.double().sum().item() for weight in local)


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """What Muon trains."""
    return [param for param in module.parameters() if param.ndim == 2]


def others(module: nn.Module) -> list[nn.Parameter]:
    """What AdamW trains beside it."""
    return [param for param in module.parameters() if param.ndim != 2]


def orthogonalized_by_us(dtype: torch.dtype) -> Callable[..., Tensor]:
    """A function to give to others in place of theirs, whatever arguments follow the matrix."""

    def orthogonalize(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return lm.orthogonalize(x, dtype=dtype)

    return orthogonalize


@contextmanager
def torch_iteration(function: Callable[..., Tensor]) -> Iterator[None]:
    """Within it ``torch.optim.Muon`` orthogonalises by this function."""
    usual = torch.optim._muon._zeropower_via_newtonschulz
    torch.optim._muon._zeropower_via_newtonschulz = function
    try:
        yield
    finally:
        torch.optim._muon._zeropower_via_newtonschulz = usual


def train_under_ddp(
    task: Task, make_optimizers: Callable[[nn.Module], Iterable[Optimizer]], zero1: Zero1 | None = None
) -> Training:
    """A plain loop under DistributedDataParallel with its default options, or those of ``muon_zero1``."""
    module = task.make_model()
    wrapped = DistributedDataParallel(module, **(zero1.options.ddp_options({}) if zero1 is not None else {}))
    optimizers = list(make_optimizers(module))
    if zero1 is not None:
        zero1.attach(wrapped)
        zero1.adopt(optimizers)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = wrapped(task.inputs, task.targets)
        if zero1 is not None:
            zero1.before_backward()
        loss.backward()
        if zero1 is not None:
            zero1.after_backward()
        for optimizer in optimizers:
            optimizer.step()

    return Training(step, module)


def _ddp_adamw(task: Task) -> Training:
    return train_under_ddp(task, lambda module: [torch.optim.AdamW(module.parameters(), lr=LR)])


def _muon_zero1(task: Task) -> Training:
    optimizers: list[lm.Muon] = []

    def make(module: nn.Module) -> list[lm.Muon]:
        optimizers.append(lm.Muon(module, lr=LR, orthogonalization_dtype=task.iteration_dtype))
        return optimizers

    training = train_under_ddp(task, make, Zero1("muon_zero1"))
    (optimizer,) = optimizers
    training.owned = [
        param.detach()
        for name, param in optimizer.named_parameters()
        if optimizer.routes[name].algorithm == "muon" and optimizer.local_ranges(name, param)
    ]
    return training


def _ddp_torch_muon(task: Task) -> Training:
    def make(module: nn.Module) -> list[Optimizer]:
        return [torch.optim.Muon(matrices(module), lr=LR), torch.optim.AdamW(others(module), lr=LR)]

    training = train_under_ddp(task, make)
    if task.iteration_dtype is not None:  # it has no option for this
        step, iteration = training.step, orthogonalized_by_us(task.iteration_dtype)

        def step_by_our_iteration() -> None:
            with torch_iteration(iteration):
                step()

        training.step = step_by_our_iteration
    return training


def _ddp_zero_adamw(task: Task) -> Training:
    def make(module: nn.Module) -> list[Optimizer]:
        return [ZeroRedundancyOptimizer(module.parameters(), torch.optim.AdamW, dist.group.WORLD, lr=LR)]

    return train_under_ddp(task, make)


VARIANTS: dict[str, Callable[[Task], Training]] = {
    "ddp_adamw": _ddp_adamw,
    "muon_zero1": _muon_zero1,
    "ddp_torch_muon": _ddp_torch_muon,
    "ddp_zero_adamw": _ddp_zero_adamw,
}
