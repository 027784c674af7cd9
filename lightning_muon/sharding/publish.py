"""Weights on their way from the owners to everyone, after the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_muon._compat import all_gather_single
from lightning_muon.sharding.ownership import Slice

__all__ = ["WeightPublisher"]

# What one rank contributes to one all-gather; bounds the memory of the exchange, whatever the model.
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class _Piece:
    """Elements ``[start, stop)`` of a parameter, at ``offset`` of its owner's contribution to a chunk."""

    param: nn.Parameter
    start: int
    stop: int
    offset: int


class WeightPublisher:
    """All-gathers the owned slices of a set of parameters, bit for bit.

    Each rank's slices form one sequence in the order of the parameters; the sequences are cut into chunks of equal
    size, and every chunk is one all-gather. So only the last chunks are padded, by as much as the
    ranks' shares differ, and never a bucket by the shape of what happens to be in it.

    Args:
        slices: Ascending slices of every parameter, in an order that is the same on all ranks.
        group: The process group; ``None`` is the default one.
    """

    def __init__(self, slices: Mapping[nn.Parameter, Iterable[Slice]], group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        kinds: dict[tuple[torch.dtype, torch.device], dict[nn.Parameter, Iterable[Slice]]] = {}
        for param, pieces in slices.items():
            kinds.setdefault((param.dtype, param.device), {})[param] = pieces
        self._chunks = [
            (dtype, device, size, pieces)
            for (dtype, device), params in kinds.items()
            for size, pieces in _chunks(params, self.world_size, max(1, _CHUNK_BYTES // dtype.itemsize))
        ]

    @torch.no_grad()
    def publish(self) -> None:
        """Bring everybody's slices to everybody."""
        if self.world_size == 1:
            return
        for dtype, device, size, pieces in self._chunks:
            sent = torch.zeros(size, dtype=dtype, device=device)
            for piece in pieces[self.rank]:
                sent[piece.offset : piece.offset + piece.stop - piece.start] = _read(piece)
            received = torch.empty(self.world_size * size, dtype=dtype, device=device)
            all_gather_single(received, sent, group=self.group)
            for rank, part in enumerate(received.view(self.world_size, size)):
                if rank != self.rank:
                    for piece in pieces[rank]:
                        _write(piece, part[piece.offset : piece.offset + piece.stop - piece.start])


def _chunks(
    params: Mapping[nn.Parameter, Iterable[Slice]], world_size: int, chunk_elements: int
) -> list[tuple[int, list[list[_Piece]]]]:
    """``(elements per rank, pieces of every rank)`` of each chunk."""
    chunks: list[list[list[_Piece]]] = []
    filled = [0] * world_size
    for param, pieces in params.items():
        for piece in pieces:
            start = piece.start
            while start < piece.stop:
                number, offset = divmod(filled[piece.owner], chunk_elements)
                stop = min(piece.stop, start + chunk_elements - offset)
                while len(chunks) <= number:
                    chunks.append([[] for _ in range(world_size)])
                chunks[number][piece.owner].append(_Piece(param, start, stop, offset))
                filled[piece.owner] += stop - start
                start = stop
    sizes = [min(chunk_elements, max(filled) - number * chunk_elements) for number in range(len(chunks))]
    return list(zip(sizes, chunks, strict=True))


def _read(piece: _Piece) -> Tensor:
    return piece.param.detach().reshape(-1)[piece.start : piece.stop]


def _write(piece: _Piece, values: Tensor) -> None:
    param = piece.param.detach()
    if param.is_contiguous():
        param.view(-1)[piece.start : piece.stop] = values
    else:  # a copy in the parameter's logical order, back through its strides
        flat = param.reshape(-1)
        flat[piece.start : piece.stop] = values
        param.copy_(flat.view_as(param))
