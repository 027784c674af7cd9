"""Other people's distributed Muons, where they are installed; none is needed for the rest. See ``peers.txt``."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.two_hosts.fsdp import cpu_mesh, shard, train_sharded
from benchmarks.two_hosts.variants import LR, Task, Training, matrices, orthogonalized_by_us, others, train_under_ddp

__all__ = ["PEERS", "missing", "version"]


def missing(variant: str) -> str | None:
    """Why a peer cannot run: its package is not there; ``None`` if it is, or if ``variant`` needs none."""
    package, _ = PEERS.get(variant, (None, None))
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"the package {package} is not installed"


def version(variant: str) -> str:
    """A peer's version, if its installation tells."""
    try:
        return importlib.metadata.version(PEERS[variant][0])
    except importlib.metadata.PackageNotFoundError:
        return "not told"


def _import(name: str) -> Any:
    return importlib.import_module(name)


def _ddp_dion(task: Task) -> Training:
    """microsoft/dion's Muon: momentum on every rank, orthogonalisation shared out, updates gathered in bfloat16."""
    options = {}
    if task.iteration_dtype is not None:
        options["newton_schulz_func"] = orthogonalized_by_us(task.iteration_dtype)

    def make(module: torch.nn.Module) -> list[Any]:
        groups = [{"params": matrices(module)}, {"params": others(module), "algorithm": "adamw"}]
        return [_import("dion").Muon(groups, distributed_mesh=dist.group.WORLD, lr=LR, **options)]

    return train_under_ddp(task, make)


def _fsdp2_muon_fsdp2(task: Task) -> Training:
    """muon-fsdp2: parameters sharded by FSDP2 over all ranks, gradients gathered by an owner and scattered back."""
    peer = _import("muon_fsdp2")
    if task.iteration_dtype is not None:
        peer.zeropower_via_newtonschulz5 = orthogonalized_by_us(task.iteration_dtype)
    module = shard(task)
    optimizer = peer.Muon(
        [
            {"params": matrices(module), "lr": LR, "use_muon": True},
            {"params": others(module), "lr": LR, "use_muon": False},
        ]
    )
    return train_sharded(task, module, [optimizer])


def _fsdp2_dion(task: Task) -> Training:
    """microsoft/dion's Muon on FSDP2: one all-to-all each way for all matrices of one shape, in bfloat16."""
    options = {}
    if task.iteration_dtype is not None:
        options["newton_schulz_func"] = orthogonalized_by_us(task.iteration_dtype)
    module = shard(task)
    groups = [{"params": matrices(module)}, {"params": others(module), "algorithm": "adamw"}]
    optimizer = _import("dion").Muon(groups, distributed_mesh=cpu_mesh(), lr=LR, **options)
    return train_sharded(task, module, [optimizer])


def _deepspeed_zero1(task: Task) -> Training:
    """DeepSpeed's ZeRO stage 1 with its Muon, which chooses its iteration and dtype itself."""
    module = task.make_model()
    for param in module.parameters():
        param.use_muon = param.ndim == 2  # type: ignore[attr-defined]
    config = {
        "train_micro_batch_size_per_gpu": len(task.inputs),
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "muon", "params": {"lr": LR}},
        "zero_allow_untested_optimizer": True,
    }
    params = list(module.parameters())
    engine, *_ = _import("deepspeed").initialize(
        model=module, model_parameters=params, config=config, dist_init_required=False
    )

    def step() -> None:
        engine.backward(engine(task.inputs, task.targets))
        engine.step()

    return Training(step, module)


# By variant: the package it needs, and what makes it.
PEERS: dict[str, tuple[str, Callable[[Task], Training]]] = {
    "ddp_dion": ("dion", _ddp_dion),
    "fsdp2_dion": ("dion", _fsdp2_dion),
    "fsdp2_muon_fsdp2": ("muon_fsdp2", _fsdp2_muon_fsdp2),
    "deepspeed_zero1": ("deepspeed", _deepspeed_zero1),
}
