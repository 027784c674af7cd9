"""The shards of a stage's matrices, to their owners and back, by one packed all-to-all each way."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_muon.matrices import MatrixKey, MatrixPart
from lightning_muon.sharding.fsdp.all_to_all import AllToAll
from lightning_muon.sharding.fsdp.transfers import Rectangle, Route, StageTransfers, elements

__all__ = ["ShardExchange", "StageRoutes", "routes_of"]


@dataclass(frozen=True)
class StageRoutes:
    """A stage's transfers, as one rank sees them.

    Attributes:
        to_owners: The pieces' way to the owners of their matrices.
        back: The results' way back.
        owned: The matrices that this rank owns, with their shapes.
        like: An empty tensor of the dtype and on the device of what is exchanged.
        sent_as: The dtype in which it travels.
    """

    to_owners: Route
    back: Route
    owned: Mapping[MatrixKey, tuple[int, int]]
    like: Tensor
    sent_as: torch.dtype


def routes_of(
    transfers: StageTransfers, rank: int, world_size: int, like: Tensor, sent_as: torch.dtype | None = None
) -> StageRoutes:
    """One rank's view; without ``sent_as`` the values travel as they are."""
    owned = {key: transfers.shapes[key] for key, owner in transfers.owners.items() if owner == rank}
    ways = transfers.to_owners(rank, world_size), transfers.back(rank, world_size)
    return StageRoutes(*ways, owned, like, sent_as or like.dtype)


class ShardExchange:
    """One stage of one step. See ``lightning_muon.exchange.Exchange``.

    Args:
        routes: The stage's.
        leave_out: Matrices that are not part of this step; the same on all ranks.
        group: The process group; ``None`` is the default one.
    """

    def __init__(
        self,
        routes: StageRoutes,
        leave_out: Container[MatrixKey],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._routes, self._leave_out, self._group = routes, leave_out, group
        self._travelling = routes.like.new_empty(0, dtype=routes.sent_as)
        self._numbers: dict[Rectangle, int] = {}
        self._values: dict[Rectangle, Tensor] = {}
        self._results: dict[MatrixKey, Tensor] = {}
        self._messages: AllToAll | None = None

    def gather(self, parts: Sequence[tuple[MatrixPart, Tensor]]) -> None:
        """Start to send the parts that others own; each part is sent by one of those that hold it."""
        self._numbers = {part.rectangle: number for number, (part, _) in enumerate(parts)}
        values = {part.rectangle: value for part, value in parts}
        self._send(self._routes.to_owners, values.__getitem__)
        # what has been packed is not needed any more
        self._values = {piece: values[piece] for piece in self._kept(self._routes.to_owners.stays)}

    def matrices(self) -> Mapping[MatrixKey, Tensor]:
        """Wait for the owned matrices."""
        route, whole = self._routes.to_owners, {}
        for piece in self._kept(route.stays):
            key, own = piece[0], self._values.pop(piece)
            if own.shape == self._routes.owned[key]:
                whole[key] = own
            else:
                self._assemble(whole, piece, own)
        for piece, values in self._arrived(route):
            self._assemble(whole, piece, values)
        return whole

    def give_back(self, results: Mapping[MatrixKey, Tensor]) -> Iterable[tuple[int, Tensor]]:
        """Keep the results for the others until all can be sent together."""
        self._results.update(results)
        return ()

    def send_back(self) -> Iterable[tuple[int, Tensor]]:
        """Start to send the pieces of the results that others hold; this rank's own are here, rounded as if they had
        travelled, or it would drift away from those that hold copies."""
        self._send(self._routes.back, lambda piece: _view(self._results[piece[0]], piece))
        own = [(piece, _view(self._results[piece[0]], piece)) for piece in self._kept(self._routes.back.stays)]
        self._results = {}
        like = self._routes.like
        return [(self._numbers[piece], values.to(self._travelling.dtype).to(like.dtype)) for piece, values in own]

    def returned(self) -> Iterable[tuple[int, Tensor]]:
        """Wait for the others' results."""
        for piece, values in self._arrived(self._routes.back):
            yield self._numbers[piece], values.to(self._routes.like.dtype)

    def _send(self, route: Route, values_of: Callable[[Rectangle], Tensor]) -> None:
        messages = []
        for pieces in route.sends:
            flat = [values_of(piece).to(self._travelling.dtype).reshape(-1) for piece in self._kept(pieces)]
            messages.append(torch.cat(flat) if flat else self._travelling)
        sizes = [sum(map(elements, self._kept(pieces))) for pieces in route.receives]
        self._messages = AllToAll(messages, sizes, route.largest, self._group)

    def _arrived(self, route: Route) -> Iterable[tuple[Rectangle, Tensor]]:
        assert self._messages is not None
        messages, self._messages = self._messages.wait(), None
        for pieces, message in zip(route.receives, messages, strict=True):
            kept = self._kept(pieces)
            for piece, values in zip(kept, torch.split(message, [elements(piece) for piece in kept]), strict=True):
                yield piece, values.view(_size(piece))

    def _kept(self, pieces: Sequence[Rectangle]) -> Sequence[Rectangle]:
        return [piece for piece in pieces if piece[0] not in self._leave_out] if self._leave_out else pieces

    def _assemble(self, whole: dict[MatrixKey, Tensor], piece: Rectangle, values: Tensor) -> None:
        key = piece[0]
        if key not in whole:
            whole[key] = self._routes.like.new_empty(self._routes.owned[key])
        _view(whole[key], piece).copy_(values)


def _view(matrix: Tensor, piece: Rectangle) -> Tensor:
    _, (top, bottom), (left, right) = piece
    return matrix[top:bottom, left:right]


def _size(piece: Rectangle) -> tuple[int, int]:
    _, (top, bottom), (left, right) = piece
    return bottom - top, right - left
