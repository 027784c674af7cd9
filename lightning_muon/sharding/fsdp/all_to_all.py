"""Packed messages from every rank to every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_muon.sharding import collectives

__all__ = ["AllToAll"]

# gloo sends a message to its end before it reads, so that two ranks take turns with messages above what a socket
# buffers, 4 MiB on Linux. Half of that is as fast as anything smaller, in fewer calls.
_GLOO_MESSAGE_BYTES = 1 << 21


class AllToAll:
    """One message to each rank, and one from each, on their way.

    Args:
        messages: What goes to each rank, flat; all of one dtype and device.
        sizes: Elements that come from each rank.
        largest: Elements of the largest message between any two ranks; equal on all ranks. Without any, nothing is
            sent.
        group: The process group; ``None`` is the default one.
    """

    def __init__(
        self, messages: Sequence[Tensor], sizes: Sequence[int], largest: int, group: dist.ProcessGroup | None = None
    ) -> None:
        like = messages[0]
        limit = max(1, largest)
        if collectives.is_gloo(like, group):
            limit = max(1, _GLOO_MESSAGE_BYTES // like.element_size())
        self._received = [[like.new_empty(0)] for _ in sizes]
        self._sent: list[Tensor] = []  # alive until they have gone
        self._works = []
        for start in range(0, largest, limit):
            outgoing = [message[start : start + limit] for message in messages]
            incoming = [min(max(size - start, 0), limit) for size in sizes]
            sent, received = torch.cat(outgoing), like.new_empty(sum(incoming))
            splits = [part.numel() for part in outgoing]
            self._works.append(dist.all_to_all_single(received, sent, incoming, splits, group=group, async_op=True))
            self._sent.append(sent)
            for parts, part in zip(self._received, torch.split(received, incoming), strict=True):
                parts.append(part)

    def wait(self) -> list[Tensor]:
        """What came from each rank, flat."""
        for work in self._works:
            work.wait()
        self._sent.clear()
        return [parts[1] if len(parts) == 2 else torch.cat(parts) for parts in self._received]
