"""A module that never heard of FSDP becomes an FSDP2 module, unit by unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lightning_muon.sharding.fsdp.materialize import Materializer, require_initializers
from lightning_muon.sharding.fsdp.mixed_precision import UnitPrecision, autocast_forward
from lightning_muon.sharding.fsdp.recompute import checkpoint_activations
from lightning_muon.sharding.fsdp.same_weights import broadcast_from_first
from lightning_muon.sharding.fsdp.shardable import require_shardable, unit_tensors

__all__ = ["drop_gathered", "is_sharded", "require_sharded", "shard_module"]

# Until torch 2.13, a group of modules fails where one of them does not run, or runs again (pytorch/pytorch#180426).
_groups_can_be_partial = hasattr(FSDPModule, "reset_iter_state")


def is_sharded(module: nn.Module) -> bool:
    """Whether somebody has called ``fully_shard`` on the module or on one inside."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def shard_module(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    blocks: Mapping[str, nn.Module],
    precision: UnitPrecision,
    checkpointed: Iterable[nn.Module] = (),
    reshard_after_forward: bool | int | None = None,
    group: dist.ProcessGroup | None = None,
    strategy: str = "muon_fsdp",
) -> None:
    """Shard a module in place. Every rank must call it with the same module; afterwards all hold pieces of rank 0's.

    In the order of ``module.modules()``, every module that was built on the meta device gets its memory and its values;
    as soon as a unit is complete, it goes to the device, takes rank 0's values, and only this rank's piece of it is
    kept. So a rank holds the pieces, one block and what is in no block; and the random numbers are drawn in the order
    of one process.

    Args:
        module: The whole module, which ``fully_shard`` has not seen. Tensor parallelism may have been applied.
        mesh: One dimension, over which parameters are sharded, or two, ``(replicas, shards)``.
        blocks: What is a unit of its own, by name: see ``find_blocks``.
        precision: See ``unit_precision``.
        checkpointed: Modules whose activations are computed again in backward.
        reshard_after_forward: torch's: whether a block's weights are dropped after forward and gathered again for
            backward, or the number of ranks to keep them over. ``None`` drops them. What is in no block keeps its
            weights, unless there are no blocks and this is ``True`` or a number.
        group: All processes of the job; ``None`` is the default process group.
        strategy: The strategy's name, for error messages.

    Raises:
        TypeError: The module is wrapped by FSDP1 or DistributedDataParallel, or cannot be given values.
        ValueError: A parameter cannot be sharded.
    """
    require_shardable(module, blocks, strategy)
    require_initializers(module)
    if precision.autocast is not None:
        for block in blocks.values():
            autocast_forward(block, mesh.device_type, precision.autocast)
    checkpoint_activations(checkpointed)
    device = _device(mesh)
    materializer = Materializer(device)
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard_after_forward}
    names = {id(block): name for name, block in blocks.items()}
    seen: set[nn.Module] = set()

    def complete(unit: nn.Module) -> None:
        tensors = list({id(tensor): tensor for _, tensor in unit_tensors(unit, blocks)}.values())
        for tensor in tensors:
            if tensor.device != device:
                tensor.data = tensor.data.to(device)
        broadcast_from_first(tensors, mesh, group)

    def visit(part: nn.Module) -> None:
        seen.add(part)
        materializer.materialize(part)
        for child in part.children():
            if child not in seen:
                visit(child)
        if id(part) in names:
            complete(part)
            if precision.autocast is not None and (full := _full_modules(part, precision.full)):
                for together in [full] if _groups_can_be_partial else full:
                    fully_shard(together, mp_policy=precision.rest, **options)
            fully_shard(part, mp_policy=precision.blocks, **options)

    visit(module)
    complete(module)
    if blocks and reshard_after_forward is not False:
        options["reshard_after_forward"] = None
    fully_shard(module, mp_policy=precision.rest, **options)
    require_sharded(module, strategy)


def drop_gathered(module: nn.Module) -> None:
    """Drop weights that are still gathered, so that ``module.parameters()`` are the shards that the optimizer has.

    A forward without a backward leaves what is in no block gathered. A step after it changes the shards, and the next
    forward would still compute with the weights that were gathered before: call this before every step, too.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def require_sharded(module: nn.Module, strategy: str = "muon_fsdp") -> None:
    """Check that no trainable parameter was left out; its gradient would be averaged by nobody.

    Raises:
        ValueError: A trainable parameter is whole on every rank.
    """
    whole = [
        name for name, param in module.named_parameters() if param.requires_grad and not isinstance(param, DTensor)
    ]
    if whole:
        raise ValueError(
            f"{strategy} averages gradients of sharded parameters only, and these are trainable and not sharded:"
            f" {', '.join(whole)}. Call torch.distributed.fsdp.fully_shard(self) last in configure_model, on the whole"
            " module, or freeze them with requires_grad_(False)."
        )


def _full_modules(part: nn.Module, classes: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """Modules in a block that are not gathered in 16 bits: those of the classes, and those that have no modules inside
    and parameters of one dimension only (norms, and scales of layers)."""
    found: list[nn.Module] = []
    for child in part.children():
        if isinstance(child, FSDPModule):
            continue
        params = list(child.parameters())
        is_leaf = not any(True for _ in child.children())
        if params and (isinstance(child, classes) or (is_leaf and all(param.ndim == 1 for param in params))):
            found.append(child)
        else:
            found.extend(_full_modules(child, classes))
    return list(dict.fromkeys(found))


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())
