"""The ways to train that shard the weights, all on FSDP2 with the same units: AdamW, ``muon_fsdp``, torch's Muon."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

import lightning_muon as lm
from benchmarks.two_hosts.variants import LR, Task, Training, matrices, others, torch_iteration
from lightning_muon.sharding.fsdp import FSDPOptions
from lightning_muon.sharding.fsdp.fully_sharded import FullySharded

__all__ = ["SHARDED", "cpu_mesh", "shard", "train_sharded"]


def cpu_mesh() -> DeviceMesh:
    """All ranks share every parameter."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def shard(task: Task) -> Any:
    """The model, sharded as torch's tutorials do it: layer by layer, and then the rest."""
    module: Any = task.make_model()
    mesh = cpu_mesh()
    for layer in module.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def train_sharded(task: Task, module: nn.Module, optimizers: Iterable[Optimizer]) -> Training:
    """A plain loop; what the optimizers do can be measured by itself."""
    optimizers = list(optimizers)

    def gradients() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        module(task.inputs, task.targets).backward()

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step()

    def step() -> None:
        gradients()
        update()

    return Training(step, module, replicated=False, gradients=gradients, update=update)


def _fsdp2_adamw(task: Task) -> Training:
    module = shard(task)
    return train_sharded(task, module, [torch.optim.AdamW(module.parameters(), lr=LR)])


def _muon_fsdp(task: Task, *, exchange_dtype: torch.dtype | None = None) -> Training:
    """What the strategy does, with its own reduce-scatter."""
    module = task.make_model()
    sharded = FullySharded("muon_fsdp", FSDPOptions(exchange_dtype=exchange_dtype))
    sharded.shard(module, cpu_mesh(), "32-true")
    optimizer = lm.Muon(module, lr=LR, orthogonalization_dtype=task.iteration_dtype)
    sharded.adopt(module, [optimizer])
    return train_sharded(task, module, [optimizer])


def _muon_fsdp_bf16(task: Task) -> Training:
    return _muon_fsdp(task, exchange_dtype=torch.bfloat16)


def _muon_fsdp_torch_reduce(task: Task) -> Training:
    """The same on a module that its author has sharded, whose gradients torch reduces."""
    module = shard(task)
    sharded = FullySharded("muon_fsdp", FSDPOptions())
    sharded.shard(module, cpu_mesh(), "32-true")
    optimizer = lm.Muon(module, lr=LR, orthogonalization_dtype=task.iteration_dtype)
    sharded.adopt(module, [optimizer])
    return train_sharded(task, module, [optimizer])


def _fsdp2_torch_muon(task: Task) -> Training:
    """torch's Muon as it is: its iteration in bfloat16, operation by operation on the shards."""
    module = shard(task)
    return train_sharded(
        task, module, [torch.optim.Muon(matrices(module), lr=LR), torch.optim.AdamW(others(module), lr=LR)]
    )


def _fsdp2_torch_muon_f32(task: Task) -> Training:
    """The same iteration in float32, which this benchmark's CPUs do several times faster."""
    training = _fsdp2_torch_muon(task)
    gradients, update = training.gradients, training.update
    assert gradients is not None
    assert update is not None

    def update_in_float32() -> None:
        with torch_iteration(_float32_iteration):
            update()

    def step() -> None:
        gradients()
        update_in_float32()

    training.update, training.step = update_in_float32, step
    return training


def _float32_iteration(grad: Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float) -> Tensor:
    """torch 2.13's ``_zeropower_via_newtonschulz`` without its rounding."""
    a, b, c = coefficients
    is_tall = grad.size(0) > grad.size(1)
    x = grad.T if is_tall else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


SHARDED: dict[str, Callable[[Task], Training]] = {
    "fsdp2_adamw": _fsdp2_adamw,
    "muon_fsdp": _muon_fsdp,
    "muon_fsdp_bf16": _muon_fsdp_bf16,
    "muon_fsdp_torch_reduce": _muon_fsdp_torch_reduce,
    "fsdp2_torch_muon": _fsdp2_torch_muon,
    "fsdp2_torch_muon_f32": _fsdp2_torch_muon_f32,
}
