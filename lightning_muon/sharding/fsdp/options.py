"""What can be chosen about ``muon_fsdp``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from lightning_muon.sharding.clipping import ClipScope
from lightning_muon.sharding.fsdp.blocks import WrapPolicy
from lightning_muon.sharding.missing import MissingPolicy

__all__ = ["FSDPOptions"]


@dataclass(frozen=True)
class FSDPOptions:
    """What can be chosen about ``muon_fsdp``.

    The first five are about a module that ``configure_model`` has not sharded itself.

    Attributes:
        wrap: What is sharded as a unit of its own: a class or several, or a function of name and module. ``None`` finds
            the repeated blocks.
        activation_checkpointing: Whose activations are computed again in backward: ``True`` for the units, or a class,
            or several, or a function.
        mixed_precision: torch's policy, in place of the one that follows from ``precision=``.
        full_precision: Classes of modules that are gathered in full precision under ``bf16-mixed`` and ``16-mixed``,
            such as a router that computes in float32.
        reshard_after_forward: Whether a unit's weights are dropped after forward and gathered again for backward, or
            the number of ranks to keep them over. ``None`` drops them.
        exchange_mb: MiB that a rank sends to the owners of matrices at a time, in float32. Less leaves less memory in
            flight, more makes larger batches for the orthogonalisation.
        exchange_dtype: What matrices and updates travel as. ``None`` takes bfloat16 where the orthogonalisation runs in
            bfloat16, as by default on CUDA, and float32 elsewhere.
        missing_gradients: A parameter got a gradient on some ranks only. ``"zero"`` averages with zeros, as DDP does;
            ``"skip"`` leaves it alone in this step; ``"raise"`` is an error on every rank, and what ``None`` means with
            torch 2.13 or later. Before, FSDP2 has no way to find out, and every rank must use the same parameters.
        clip_scope: What clipping by the norm clips: ``"all"`` parameters by their common norm; those of ``"adamw"``
            only, by theirs; or ``"none"``, to have the norms and clip nothing.

    Raises:
        ValueError: A value out of range.
    """

    wrap: WrapPolicy | None = None
    activation_checkpointing: bool | WrapPolicy = False
    mixed_precision: MixedPrecisionPolicy | None = None
    full_precision: Collection[type[nn.Module]] = ()
    reshard_after_forward: bool | int | None = None
    exchange_mb: float = 8.0
    exchange_dtype: torch.dtype | None = None
    missing_gradients: MissingPolicy | None = None
    clip_scope: ClipScope = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.exchange_mb, (int, float)) or not 0 < self.exchange_mb < float("inf"):
            raise ValueError(f"exchange_mb={self.exchange_mb!r} must be a positive number of MiB.")
        if self.exchange_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"exchange_dtype={self.exchange_dtype!r} must be torch.float32, torch.bfloat16, or None.")
        for name, value, values in (
            ("missing_gradients", self.missing_gradients, (None, *get_args(MissingPolicy))),
            ("clip_scope", self.clip_scope, get_args(ClipScope)),
        ):
            if value not in values:
                raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, values))}.")

    @property
    def missing_policy(self) -> MissingPolicy | None:
        """The policy on missing gradients that holds; ``None`` where torch has no way to have one."""
        if self.missing_gradients is None and hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            return "raise"
        return self.missing_gradients
