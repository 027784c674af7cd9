"""Which numbers FSDP2 gathers, computes and reduces with, from Lightning's ``precision=``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

__all__ = ["UnitPrecision", "unit_precision"]


@dataclass(frozen=True)
class UnitPrecision:
    """The policies of the units.

    Attributes:
        blocks: For the blocks.
        rest: For what is in no block.
        keeps_vectors: Whether modules in a block that have vectors only, such as norms, are a group of their own,
            under the policy of the rest.
    """

    blocks: MixedPrecisionPolicy
    rest: MixedPrecisionPolicy
    keeps_vectors: bool = False


def unit_precision(precision: str, policy: MixedPrecisionPolicy | None = None) -> UnitPrecision:
    """What makes FSDP2 compute what ``DistributedDataParallel`` computes under the same ``precision=``.

    Under ``"bf16-mixed"`` and ``"16-mixed"``, autocast chooses the precision of each operation, on top of FSDP2. It
    rounds the weights of matrix products to 16 bits, so a block's weights can be rounded before they are gathered,
    for half the bytes. What autocast does not round stays in float32: the modules of a block that have vectors only
    (norms: one more small gather and reduction per block) and what is in no block (embeddings, whose output is the
    residual stream, and the head). Inputs are not cast. Gradients are reduced in float32. What is left of a difference
    to DistributedDataParallel is a matrix in a block that the model itself uses outside autocast, such as a router's:
    it is used rounded.

    torch's usual policy, ``MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)``, rounds the
    residual stream, too. Pass it as ``policy`` for fewer bytes and collectives.

    The other precisions need no policy: parameters, gradients and their reduction have one dtype.

    Args:
        precision: ``"32-true"``, ``"bf16-mixed"``, ``"16-mixed"``, ``"bf16-true"``, ``"16-true"`` or ``"64-true"``, or
            a plugin's own name.
        policy: What to use for every unit instead.
    """
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    if policy is not None:
        return UnitPrecision(policy, policy)
    if half is None:
        return UnitPrecision(MixedPrecisionPolicy(), MixedPrecisionPolicy())
    rounded = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    return UnitPrecision(rounded, MixedPrecisionPolicy(cast_forward_inputs=False), keeps_vectors=True)
