"""Parameters that got a gradient on some ranks only, under FSDP2, where ranks must reduce the same parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_muon.sharding.missing import MissingPolicy, count_present, missing_error

__all__ = ["MissingFSDPGradients"]


class MissingFSDPGradients:
    """Finds such parameters, on all ranks together, and does what was asked for.

    FSDP2 reduces a unit's gradients together, those that there are. Where ranks have different ones, they send
    messages of different sizes: gloo ends the process, NCCL hangs or mixes gradients. With a policy, a rank sends zeros
    for what it has not (torch 2.13). What has no gradient on any rank ends without one, as in torch.

    No policy helps where a whole unit runs on some ranks only: they wait for each other to gather its weights. Choose
    larger units, so that what is optional is inside of one.

    Args:
        policy: ``"zero"`` averages with a zero for each rank that has none, which is what DDP does; ``"skip"`` leaves
            the parameter alone in this step; ``"raise"`` is an error; ``None`` is FSDP2's own: nothing is sent, counted
            or checked, and every rank must use the same parameters.
        group: The process group; ``None`` is the default one. It must have the ranks of all replicas and shards.

    Raises:
        RuntimeError: torch is too old for a policy.
    """

    def __init__(self, policy: MissingPolicy | None, group: dist.ProcessGroup | None = None) -> None:
        if policy is not None and not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise RuntimeError(
                f"missing_gradients={policy!r} needs torch 2.13 or later with FSDP2, and this is torch"
                f" {torch.__version__}. Leave it out, and have every rank use the same parameters."
            )
        self.policy, self.group = policy, group
        self._present: set[nn.Parameter] = set()
        self._watched: dict[nn.Parameter, Any] = {}  # from the whole parameter to FSDP2's record of it

    def watch(self, module: nn.Module) -> None:
        """Note from now on which parameters get a gradient, and have this rank send zeros for the others.

        Every rank must call it: each unit is gathered once, since autograd sees the whole parameters, and FSDP2 makes
        these, once and for all, when it first gathers them.

        Args:
            module: The sharded module, before its first forward.
        """
        if self.policy is None:
            return
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_reduce_scatter_unused_params(True, recurse=False)
                part.unshard()
                self._watch(part)
                part.reshard()
                part.register_forward_pre_hook(self._before_forward)  # FSDP2's own came first

    def resolve(self, names: Mapping[nn.Parameter, str]) -> None:
        """Apply the policy to averaged gradients, before anybody uses them. Every rank must call it; to call it again
        before the step changes nothing.

        Args:
            names: The sharded parameters by name, in an order that is the same on all ranks.

        Raises:
            RuntimeError: A gradient is missing on some ranks only, and the policy is ``"raise"``; on every rank.
        """
        if self.policy is None or not names:
            return
        watched = {entry.sharded_param for entry in self._watched.values()}
        present = [param in self._present or (param not in watched and param.grad is not None) for param in names]
        counts = count_present(present, names, self.group)
        for param, count in counts.items():
            if not count or self.policy == "skip":
                param.grad = None  # zeros that FSDP2 has reduced
        if self.policy == "raise" and any(counts.values()):
            raise missing_error(counts, names, self.group)

    def forget(self, params: Iterable[nn.Parameter]) -> None:
        """The step of these is over, or their gradients have been dropped."""
        self._present.difference_update(params)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_forward(self, unit: FSDPModule, _inputs: Any) -> None:
        self._watch(unit)  # what has been unfrozen meanwhile
        for group in _groups(unit):
            _complete_accumulation(group)

    def _watch(self, unit: FSDPModule) -> None:
        for group in _groups(unit):
            for entry in group.fsdp_params:
                whole = entry.unsharded_param
                if whole.requires_grad and whole not in self._watched:
                    self._watched[whole] = entry
                    whole.register_post_accumulate_grad_hook(self._note)

    def _note(self, whole: nn.Parameter) -> None:
        self._present.add(self._watched[whole].sharded_param)


def _groups(unit: FSDPModule) -> list[Any]:
    return unit._get_fsdp_state()._fsdp_param_groups


def _complete_accumulation(group: Any) -> None:
    """Gradients that wait for a later backward wait in the dtype of the reduction; torch's zeros, and gradients that
    come in the last backward only, would have that of the weights, and FSDP2 reduces one dtype at a time."""
    waiting = [entry for entry in group.fsdp_params if entry.unsharded_accumulated_grad is not None]
    if waiting:
        for entry in group.fsdp_params:
            whole = entry.unsharded_param
            if entry.unsharded_accumulated_grad is None and whole.requires_grad and whole.grad is None:
                entry.unsharded_accumulated_grad = torch.zeros_like(whole, dtype=entry.reduce_dtype)
