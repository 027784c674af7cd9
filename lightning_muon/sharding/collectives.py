"""The two exchanges of ZeRO-1 where every rank owns a part of its own size: sum onto the owners, and gather from them.

Together they carry what DDP's all-reduce carries, in its two halves. gloo's `reduce_scatter_tensor` sends twice the
bytes that are needed and its `all_gather` refuses uneven sizes; its `all_to_all_single` sends what is needed. On
NCCL an all-to-all would send a part to every GPU of another node by itself; so there each part is one `reduce`, and
one `broadcast`, which crosses the link between two nodes once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Gathering", "Piece", "global_rank", "in_chunks", "sum_onto_owners"]

_Source = TypeVar("_Source")
Piece = tuple[_Source, int, int]
"""Elements `[start, stop)` of something."""

# gloo sends a message to its end before it reads: two ranks that exchange large ones take turns, in twice the time.
MESSAGE_BYTES = 1 << 20


def in_chunks(
    pieces: Sequence[Sequence[Piece[_Source]]], like: Tensor, group: dist.ProcessGroup | None = None
) -> list[tuple[tuple[Piece[_Source], ...], ...]]:
    """Divide an exchange into several, each with messages of a good size.

    Args:
        pieces: What every rank owns.
        like: A tensor of the dtype and device that is sent.
        group: The process group; `None` is the default one.

    Returns:
        What every rank owns, for every exchange.
    """
    if not is_gloo(like, group):
        return [tuple(map(tuple, pieces))]
    limit = max(1, MESSAGE_BYTES // like.element_size())
    chunks: list[list[list[Piece[_Source]]]] = []
    for rank, owned in enumerate(pieces):
        filled = 0
        for source, start, end in owned:
            while start < end:
                number, offset = divmod(filled, limit)
                stop = min(end, start + limit - offset)
                if number == len(chunks):
                    chunks.append([[] for _ in pieces])
                chunks[number][rank].append((source, start, stop))
                filled += stop - start
                start = stop
    return [tuple(map(tuple, chunk)) for chunk in chunks]


def sum_onto_owners(
    parts: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None = None
) -> torch.futures.Future[Tensor]:
    """Start to sum every owner's part over the ranks, onto that owner.

    A rank sends all that it does not own. On gloo the owner receives its part from every other rank and sums in the
    order of the ranks, in float32 at least, so that the result does not depend on timing.

    Args:
        parts: `(sum(sizes),)`, rank 0's part first; the exchange may write to it.
        sizes: Elements of every rank's part, equal on all ranks.
        group: The process group; `None` is the default one.

    Returns:
        A future of this rank's part, summed: `(sizes[rank],)`, float32 at least.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    exact = torch.promote_types(parts.dtype, torch.float32)
    result: torch.futures.Future[Tensor]
    if is_gloo(parts, group):
        received = parts.new_empty(sizes[rank] * world_size)
        work = dist.all_to_all_single(
            received, parts, [sizes[rank]] * world_size, list(sizes), group=group, async_op=True
        )

        def add(done: torch.futures.Future[list[Tensor]], _alive: Tensor = parts) -> Tensor:
            done.wait()
            return received.view(world_size, -1).sum(dim=0, dtype=exact)

        result = work.get_future().then(add)
        return result
    split = torch.split(parts, list(sizes))
    *earlier, last = [
        dist.reduce(part, global_rank(group, owner), group=group, async_op=True)
        for owner, part in enumerate(split)
        if part.numel()
    ]

    def own(done: torch.futures.Future[list[Tensor]]) -> Tensor:
        done.wait()
        for work in earlier:
            work.wait()
        return split[rank].to(exact)

    result = last.get_future().then(own)
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
        others = [0 if other == rank else size for other, size in enumerate(sizes)]
        received = own.new_empty(sum(others))
        self._parts = list(torch.split(received, others))
        self._parts[rank] = own
        if is_gloo(own, group):
            self._sent = own if world_size == 2 else own.repeat(world_size - 1)
            splits = [0 if other == rank else sizes[rank] for other in range(world_size)]
            self._works = [dist.all_to_all_single(received, self._sent, others, splits, group=group, async_op=True)]
        else:
            self._works = [
                dist.broadcast(part, global_rank(group, owner), group=group, async_op=True)
                for owner, part in enumerate(self._parts)
                if part.numel()
            ]

    def wait(self) -> list[Tensor]:
        """The parts of all ranks, this rank's own among them."""
        for work in self._works:
            work.wait()
        return self._parts


def is_gloo(tensor: Tensor, group: dist.ProcessGroup | None) -> bool:
    return not tensor.is_cuda or dist.get_backend(group) == "gloo"


def global_rank(group: dist.ProcessGroup | None, rank: int) -> int:
    """What the default group calls a rank of `group`."""
    return rank if group is None else dist.get_global_rank(group, rank)
