"""What FSDP2 cannot shard is an error that names the parameter and the fix, before anything has been changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

__all__ = ["require_shardable", "unit_tensors"]


def unit_tensors(unit: nn.Module, blocks: Mapping[str, nn.Module], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a unit by name: of all modules inside, but not of blocks inside. What is shared by two
    modules comes twice.

    Args:
        unit: A block, or the whole module.
        blocks: All blocks, by name.
        prefix: What to put before each name.
    """
    inner = {id(block) for block in blocks.values() if block is not unit}

    def visit(part: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
        for tensors in (part._parameters, part._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    yield name + key, tensor
        for key, child in part.named_children():
            if id(child) not in inner:
                yield from visit(child, f"{name}{key}.")

    return visit(unit, prefix)


def require_shardable(module: nn.Module, blocks: Mapping[str, nn.Module], strategy: str) -> None:
    """Check a module and its blocks.

    Args:
        module: The whole module.
        blocks: What will be units of their own, by name.
        strategy: The strategy's name, for error messages.

    Raises:
        TypeError: The module, or one inside, is wrapped by another kind of data parallelism.
        ValueError: A parameter is shared by units or has a form that FSDP2 does not take.
    """
    for name, part in module.named_modules():
        if isinstance(part, (FullyShardedDataParallel, DistributedDataParallel)):
            kind = "FullyShardedDataParallel (FSDP1)" if isinstance(part, FullyShardedDataParallel) else "DDP"
            raise TypeError(
                f"{strategy} shards modules itself, by FSDP2, and found {name or 'the module'} wrapped in {kind}."
                " Remove that wrapper and FSDP1's wrap() and auto_wrap; choose units with the strategy's wrap= instead,"
                " or call torch.distributed.fsdp.fully_shard in configure_model."
            )
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
            raise ValueError(f"{strategy} cannot reduce sparse gradients; build {name or 'it'} with sparse=False.")
    unit_of: dict[Tensor, tuple[str, str]] = {}
    for unit_name, unit in {**blocks, "": module}.items():
        prefix = f"{unit_name}." if unit_name else ""
        dtypes: dict[torch.dtype, str] = {}
        for name, tensor in unit_tensors(unit, blocks, prefix):
            if not isinstance(tensor, nn.Parameter):
                continue
            first_unit, first_name = unit_of.setdefault(tensor, (unit_name, name))
            if first_unit != unit_name:
                raise ValueError(
                    f"{first_name} and {name} are one parameter in two units, {_called(first_unit)} and"
                    f" {_called(unit_name)}, which {strategy} would shard as two. Choose units with wrap= so that one"
                    " of them holds both; what is in no block is together."
                )
            _require_form(name, tensor, strategy)
            if tensor.requires_grad:
                dtypes.setdefault(tensor.dtype, name)
        if len(dtypes) > 1:
            found = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
            raise ValueError(
                f"{strategy} needs one dtype for all trainable parameters of a unit, and in {_called(unit_name)}"
                f" {found}. Convert them, or choose units with wrap= so that each has one dtype."
            )


def _require_form(name: str, param: nn.Parameter, strategy: str) -> None:
    fixes = [
        (is_lazy(param), "has no shape yet", "Run the module once, or give the sizes, before training"),
        (param.layout is not torch.strided, f"has the layout {param.layout}", "Make it dense"),
        (param.ndim == 0, "is a scalar", "Give it the shape (1,)"),
        (
            not is_lazy(param) and param.layout is torch.strided and not param.is_contiguous(),
            "is not contiguous in memory",
            "Make it so with .contiguous(), and do not convert the module with memory_format=torch.channels_last",
        ),
    ]
    for is_so, what, fix in fixes:
        if is_so:
            raise ValueError(f"{strategy} cannot shard {name}, which {what}. {fix}.")


def _called(unit: str) -> str:
    return unit or "what is in no block"
