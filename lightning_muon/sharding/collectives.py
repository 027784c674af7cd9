"""The two exchanges of ZeRO-1 where every rank owns a part of its own size: sum onto the owners, and gather from them.

Together they carry what DDP's all-reduce carries, in its two halves. NCCL takes uneven sizes in its own reduce-scatter
and all-gather. gloo does not, and its `reduce_scatter_tensor` sends twice the bytes that are needed; but its
`all_to_all_single` takes uneven splits and sends just these, so there both exchanges are built on that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Gathering", "sum_onto_owners"]


def sum_onto_owners(
    parts: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None = None
) -> torch.futures.Future[Tensor]:
    """Start to sum every owner's part over the ranks, onto that owner.

    A rank sends all that it does not own, and receives its own part from every other rank. On gloo the owner sums in
    the order of the ranks, in float32 at least, so that the result does not depend on timing.

    Args:
        parts: `(sum(sizes),)`, rank 0's part first; it must not be changed before the future is done.
        sizes: Elements of every rank's part, equal on all ranks.
        group: The process group; `None` is the default one.

    Returns:
        A future of this rank's part, summed: `(sizes[rank],)`, float32 at least.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    exact = torch.promote_types(parts.dtype, torch.float32)
    if _takes_uneven_sizes(parts, group):
        own = parts.new_empty(sizes[rank])
        work = dist.reduce_scatter(own, list(torch.split(parts, list(sizes))), group=group, async_op=True)
        assert work is not None
        result: torch.futures.Future[Tensor] = work.get_future().then(lambda _, _alive=parts: own.to(exact))
        return result
    received = parts.new_empty(sizes[rank] * world_size)
    work = dist.all_to_all_single(received, parts, [sizes[rank]] * world_size, list(sizes), group=group, async_op=True)

    def add(done: torch.futures.Future[list[Tensor]], _alive: Tensor = parts) -> Tensor:
        done.wait()
        return received.view(world_size, -1).sum(dim=0, dtype=exact)

    result = work.get_future().then(add)
    return result


class Gathering:
    """Everybody's parts on their way to everybody: a rank sends its own `N-1` times, and receives all others.

    Args:
        own: This rank's part, `(sizes[rank],)`; it must not be changed before `wait` returns.
        sizes: Elements of every rank's part, equal on all ranks.
        group: The process group; `None` is the default one.
    """

    def __init__(self, own: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None = None) -> None:
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        if _takes_uneven_sizes(own, group):
            self._parts = [own if other == rank else own.new_empty(size) for other, size in enumerate(sizes)]
            self._sent = own
            self._work = dist.all_gather(self._parts, own, group=group, async_op=True)
            return
        others = [0 if other == rank else size for other, size in enumerate(sizes)]
        self._sent = own if world_size == 2 else own.repeat(world_size - 1)
        received = own.new_empty(sum(others))
        splits = [0 if other == rank else sizes[rank] for other in range(world_size)]
        self._work = dist.all_to_all_single(received, self._sent, others, splits, group=group, async_op=True)
        self._parts = list(torch.split(received, others))
        self._parts[rank] = own

    def wait(self) -> list[Tensor]:
        """The parts of all ranks, this rank's own among them."""
        self._work.wait()
        return self._parts


def _takes_uneven_sizes(tensor: Tensor, group: dist.ProcessGroup | None) -> bool:
    return tensor.is_cuda and dist.get_backend(group) != "gloo"
