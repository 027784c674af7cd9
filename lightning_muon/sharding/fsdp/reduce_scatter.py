"""FSDP2's reduce-scatter of gradients on gloo, whose own sends what a whole all-reduce sends."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

__all__ = ["PairwiseReduceScatter", "reduce_scatter_pairwise"]

# What a rank hands to one all-to-all, and how many are on their way: enough to keep a link busy, and 16 MiB in all,
# sent and received, however large a unit is and however many ranks there are.
_BYTES, _IN_FLIGHT = 1 << 21, 4


class PairwiseReduceScatter:
    """Each rank sends each other rank that one's part, and sums what arrives: ``(N-1)/N`` of the gradients.

    The sum is in the order of the ranks and in float32 at least, so that it does not depend on timing. It is an
    ``FSDPModule.set_custom_reduce_scatter``'s communication; torch keeps the base class of these private.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for FSDP2."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        """Sum or average over the ranks of ``group``; anything else is torch's.

        Args:
            output_tensor: ``(size,)``, this rank's part.
            input_tensor: ``(N * size,)``, rank 0's part first; FSDP2 has padded the parts to one size.
            group: The ranks that share the parameters.
            op: ``ReduceOp``.
            async_op: Whether to return before the end, which FSDP2 does not ask for.
        """
        if async_op or op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            theirs: dist.Work | None = dist.reduce_scatter_tensor(output_tensor, input_tensor, op, group, async_op)
            return theirs
        exact = torch.promote_types(input_tensor.dtype, torch.float32)
        world_size = dist.get_world_size(group)
        parts = input_tensor.view(world_size, -1)
        limit = max(1, _BYTES // (world_size * input_tensor.element_size()))
        travelling: deque[tuple[Tensor, Tensor, Tensor, dist.Work]] = deque()

        def add() -> None:
            target, _, received, work = travelling.popleft()
            work.wait()
            total = received.sum(dim=0, dtype=exact)
            target.copy_(total.div_(world_size) if op == dist.ReduceOp.AVG else total)

        for target, part in zip(torch.split(output_tensor, limit), torch.split(parts, limit, dim=1), strict=True):
            sent, received = part.contiguous(), torch.empty_like(part, memory_format=torch.contiguous_format)
            work = dist.all_to_all_single(received, sent, group=group, async_op=True)
            travelling.append((target, sent, received, work))
            if len(travelling) == _IN_FLIGHT:
                add()
        while travelling:
            add()
        return None


def reduce_scatter_pairwise(module: nn.Module, mesh: DeviceMesh) -> bool:
    """Have the units of a sharded module reduce their gradients so, if they are on the CPU and talk over gloo.

    Args:
        module: The sharded module.
        mesh: ``(shards,)`` or ``(replicas, shards)``, what it is sharded over.

    Returns:
        Whether they do; not where torch has no way to choose, or with another backend.
    """
    if mesh.device_type != "cpu" or not hasattr(FSDPModule, "set_custom_reduce_scatter"):
        return False
    if dist.get_backend(mesh.get_group(mesh.ndim - 1)) != "gloo":
        return False
    comm: Any = PairwiseReduceScatter()
    for part in module.modules():
        if isinstance(part, FSDPModule):
            with suppress(ValueError):  # a unit on several meshes keeps torch's
                part.set_custom_reduce_scatter(comm)
    return True
