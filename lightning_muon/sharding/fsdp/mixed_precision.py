"""Which numbers FSDP2 gathers, computes and reduces with, from Lightning's ``precision=``."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

__all__ = ["UnitPrecision", "autocast_forward", "unit_precision"]


@dataclass(frozen=True)
class UnitPrecision:
    """The policies of the units.

    Attributes:
        blocks: For the blocks.
        rest: For what is in no block.
        autocast: The 16-bit dtype of autocast, if there is one. Then modules in a block that have vectors only, such as
            norms, are a group of their own, under the policy of the rest.
        full: Classes of modules that are in these groups, too.
    """

    blocks: MixedPrecisionPolicy
    rest: MixedPrecisionPolicy
    autocast: torch.dtype | None = None
    full: tuple[type[nn.Module], ...] = ()


def unit_precision(
    precision: str, policy: MixedPrecisionPolicy | None = None, full: Collection[type[nn.Module]] = ()
) -> UnitPrecision:
    """What makes FSDP2 compute what ``DistributedDataParallel`` computes under the same ``precision=``.

    Under ``"bf16-mixed"`` and ``"16-mixed"``, autocast chooses the precision of each operation, on top of FSDP2. It
    rounds the weights of matrix products to 16 bits, so a block's weights can be rounded before they are gathered,
    for half the bytes. What autocast does not round stays in float32: the modules of a block that have vectors only
    (norms: one more small gather and reduction per block) and what is in no block (embeddings, whose output is the
    residual stream, and the head). Inputs are not cast. Gradients are reduced in float32. What is left of a difference
    to DistributedDataParallel is a matrix in a block that the model itself uses outside autocast, such as a router's:
    it is used rounded, unless its class is in ``full``. Blocks that are called outside autocast, by a callback, say,
    turn it on for themselves.

    torch's usual policy, ``MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)``, rounds the
    residual stream, too. Pass it as ``policy`` for fewer bytes and collectives, and for compiled blocks:
    ``torch.compile`` breaks its graph where a norm is gathered (an error with ``fullgraph=True``), and compiles nothing
    of a block that was compiled by ``block.compile()`` and is checkpointed.

    The other precisions need no policy: parameters, gradients and their reduction have one dtype.

    Args:
        precision: ``"32-true"``, ``"bf16-mixed"``, ``"16-mixed"``, ``"bf16-true"``, ``"16-true"`` or ``"64-true"``, or
            a plugin's own name.
        policy: What to use for every unit instead.
        full: Classes of modules in blocks whose weights are gathered as they are, like norms.
    """
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    if policy is not None:
        return UnitPrecision(policy, policy)
    if half is None:
        return UnitPrecision(MixedPrecisionPolicy(), MixedPrecisionPolicy())
    rounded = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    return UnitPrecision(rounded, MixedPrecisionPolicy(cast_forward_inputs=False), half, tuple(full))


def autocast_forward(module: nn.Module, device_type: str, dtype: torch.dtype) -> None:
    """Have a module whose weights are gathered in 16 bits compute with autocast, also where nobody turned it on."""
    forward = module.forward

    @functools.wraps(forward)
    def with_autocast(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled(device_type):
            return forward(*args, **kwargs)
        with torch.autocast(device_type, dtype):
            return forward(*args, **kwargs)

    module.forward = with_autocast
