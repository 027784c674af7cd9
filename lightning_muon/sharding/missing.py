"""Parameters that got a gradient on some ranks only: a branch not taken there, an expert without tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["MissingGradients", "MissingPolicy", "count_present", "missing_error"]

MissingPolicy = Literal["raise", "zero", "skip"]


class MissingGradients:
    """Finds such parameters, on all ranks together, and does what was asked for.

    What has no gradient on any rank is left alone by every policy, as in torch.

    Args:
        policy: `"zero"` averages with a zero for each rank that has none, which is what DDP does; `"skip"` leaves the
            parameter alone in this step; `"raise"` is an error.
        group: The process group; `None` is the default one.
    """

    def __init__(self, policy: MissingPolicy, group: dist.ProcessGroup | None = None) -> None:
        self.policy, self.group = policy, group
        self._present: set[nn.Parameter] = set()

    def watch(self, params: Iterable[nn.Parameter]) -> None:
        """Note from now on which of these get a gradient; where every parameter must, DDP itself finds out."""
        if self.policy != "zero":
            for param in params:
                if param.requires_grad:
                    param.register_post_accumulate_grad_hook(self._present.add)  # type: ignore[no-untyped-call]

    def resolve(self, names: Mapping[nn.Parameter, str]) -> None:
        """Apply the policy to averaged gradients, before anybody uses them. Every rank must call it; to call it again
        before the step changes nothing.

        Args:
            names: The parameters by name, in an order that is the same on all ranks.

        Raises:
            RuntimeError: A gradient is missing on some ranks only, and the policy is `"raise"`; on every rank.
        """
        if self.policy == "zero" or not names:
            return
        counts = count_present([param in self._present for param in names], names, self.group)
        partly = [param for param, count in counts.items() if count]
        if self.policy == "skip":
            for param in partly:
                param.grad = None
        elif partly:
            raise missing_error(counts, names, self.group)

    def forget(self, params: Iterable[nn.Parameter]) -> None:
        """The step of these is over, or their gradients have been dropped."""
        self._present.difference_update(params)


def count_present(
    is_present: Sequence[bool], names: Mapping[nn.Parameter, str], group: dist.ProcessGroup | None
) -> dict[nn.Parameter, int]:
    """On how many ranks each parameter got a gradient, where that is not all of them. Every rank must call it.

    Args:
        is_present: Whether it did on this rank, for each of ``names``.
        names: The parameters, in an order that is the same on all ranks.
        group: The process group; `None` is the default one.
    """
    counts = torch.tensor(is_present, dtype=torch.int32).to(next(iter(names)).device)
    dist.all_reduce(counts, group=group)
    world_size = dist.get_world_size(group)
    return {param: count for param, count in zip(names, counts.tolist(), strict=True) if count < world_size}


def missing_error(
    counts: Mapping[nn.Parameter, int], names: Mapping[nn.Parameter, str], group: dist.ProcessGroup | None
) -> RuntimeError:
    """The error that names the parameters that some ranks have a gradient of, and on how many."""
    size = dist.get_world_size(group)
    found = ", ".join(f"{names[param]} (on {count} of {size} ranks)" for param, count in counts.items() if count)
    return RuntimeError(
        f"Parameters that got a gradient on some ranks only: {found}. Pass missing_gradients='zero' to the"
        " strategy to average with zeros, as DDP does, or 'skip' to leave such a parameter alone for the step."
    )
