"""Who owns each matrix, and which pieces travel between whom: a pure function of what every rank holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightning_muon.matrices import MatrixKey, MatrixPart
from lightning_muon.partition import Range

__all__ = ["HeldMatrix", "Loads", "Rectangle", "Route", "StageTransfers", "elements", "held_matrices", "plan_stage"]

Rectangle = tuple[MatrixKey, Range, Range]
"""A piece of a matrix: which, its rows, its columns."""


@dataclass(frozen=True)
class HeldMatrix:
    """A matrix, and who holds what of it.

    Attributes:
        key: Which.
        shape: Rows and columns.
        flops: Cost of its orthogonalisation.
        pieces: ``(rank, rectangle)``; ranks may hold equal pieces, and pieces that differ do not overlap.
    """

    key: MatrixKey
    shape: tuple[int, int]
    flops: int
    pieces: tuple[tuple[int, Rectangle], ...]

    @property
    def numel(self) -> int:
        """Its elements."""
        return self.shape[0] * self.shape[1]


@dataclass
class Loads:
    """What the ranks have been given so far, over all stages.

    Attributes:
        flops: Orthogonalisation FLOPs of each rank.
        owned: Elements of the matrices it owns.
        sent: Elements that it sends to owners.
    """

    flops: list[int]
    owned: list[int]
    sent: list[int]

    @classmethod
    def none(cls, world_size: int) -> Loads:
        """Nothing yet."""
        return cls([0] * world_size, [0] * world_size, [0] * world_size)


@dataclass(frozen=True)
class Route:
    """What one rank exchanges with the others, one way.

    Attributes:
        sends: Its pieces that go to each rank, in the order in which they are packed.
        receives: The pieces that come from each rank.
        stays: The pieces of which it is both source and target.
        largest: Elements of the largest message between any two ranks.
    """

    sends: tuple[tuple[Rectangle, ...], ...]
    receives: tuple[tuple[Rectangle, ...], ...]
    stays: tuple[Rectangle, ...]
    largest: int

    @property
    def sent(self) -> int:
        """Elements that the rank sends."""
        return sum(elements(piece) for pieces in self.sends for piece in pieces)


@dataclass(frozen=True)
class StageTransfers:
    """The transfers of a stage.

    Attributes:
        owners: The rank that owns each matrix.
        shapes: The matrices.
        gathered: ``(from, to, piece)``: the pieces of a matrix travel to its owner, each element once.
        returned: ``(from, to, piece)``: pieces of the result travel to everybody who holds them.
    """

    owners: Mapping[MatrixKey, int]
    shapes: Mapping[MatrixKey, tuple[int, int]]
    gathered: tuple[tuple[int, int, Rectangle], ...]
    returned: tuple[tuple[int, int, Rectangle], ...]

    def to_owners(self, rank: int, world_size: int) -> Route:
        """A rank's way to the owners."""
        return _route(self.gathered, rank, world_size)

    def back(self, rank: int, world_size: int) -> Route:
        """A rank's way back."""
        return _route(self.returned, rank, world_size)


def _route(moves: Iterable[tuple[int, int, Rectangle]], rank: int, world_size: int) -> Route:
    sends: list[list[Rectangle]] = [[] for _ in range(world_size)]
    receives: list[list[Rectangle]] = [[] for _ in range(world_size)]
    stays = []
    messages: Counter[tuple[int, int]] = Counter()
    for source, target, piece in moves:
        if source == target:
            if source == rank:
                stays.append(piece)
            continue
        messages[source, target] += elements(piece)
        if source == rank:
            sends[target].append(piece)
        if target == rank:
            receives[source].append(piece)
    largest = max(messages.values(), default=0)
    return Route(tuple(map(tuple, sends)), tuple(map(tuple, receives)), tuple(stays), largest)


def elements(rectangle: Rectangle) -> int:
    """The elements of a piece."""
    _, (top, bottom), (left, right) = rectangle
    return (bottom - top) * (right - left)


def plan_stage(matrices: Iterable[HeldMatrix], hosts: Sequence[object], loads: Loads) -> StageTransfers:
    """Give every matrix an owner, and choose who sends what.

    A matrix that some rank holds whole is owned by such a rank: nothing has to travel before its orthogonalisation,
    and nothing after it if nobody else holds it. Any other matrix may be owned by every rank, replicas included.
    The matrices with the fewest candidates first, and the most expensive of these, each go to the candidate with the
    least work so far; the work of earlier stages counts. Of several ranks that hold a piece the owner sends it, which
    is free; else one on the owner's host; of these the one that has sent least.

    Args:
        matrices: The stage's, in an order that all ranks agree on.
        hosts: The machine of each rank.
        loads: Of the earlier stages; brought up to date.

    Raises:
        ValueError: The pieces of a matrix do not make it up.
    """
    matrices = list(matrices)
    everyone = range(len(hosts))
    whole_at = {m.key: [rank for rank, piece in m.pieces if elements(piece) == m.numel] for m in matrices}
    owners: dict[MatrixKey, int] = {}
    for matrix in sorted(matrices, key=lambda m: (len(whole_at[m.key] or everyone), -m.flops, -m.numel)):
        candidates = whole_at[matrix.key] or everyone
        owner = min(candidates, key=lambda rank: (loads.flops[rank], loads.owned[rank], rank))
        loads.flops[owner] += matrix.flops
        loads.owned[owner] += matrix.numel
        owners[matrix.key] = owner
    gathered = [move for m in matrices for move in _moves_to_owner(m, owners[m.key], hosts, loads)]
    returned = [(owners[m.key], rank, piece) for m in matrices for rank, piece in sorted(m.pieces)]
    return StageTransfers(owners, {m.key: m.shape for m in matrices}, tuple(gathered), tuple(returned))


def _moves_to_owner(
    matrix: HeldMatrix, owner: int, hosts: Sequence[object], loads: Loads
) -> Iterable[tuple[int, int, Rectangle]]:
    holders: dict[Rectangle, list[int]] = {}
    for rank, piece in matrix.pieces:
        holders.setdefault(piece, []).append(rank)
    if sum(map(elements, holders)) != matrix.numel:
        raise ValueError(f"pieces {sorted(holders)} of a matrix of shape {matrix.shape}")
    for piece in sorted(holders):
        source = min(holders[piece], key=lambda r: (r != owner, hosts[r] != hosts[owner], loads.sent[r], r))
        if source != owner:
            loads.sent[source] += elements(piece)
        yield source, owner, piece


def held_matrices(parts_by_rank: Sequence[Sequence[MatrixPart]], flops: Mapping[MatrixKey, int]) -> list[HeldMatrix]:
    """Put together what the ranks hold of some matrices, in the order of ``flops``."""
    pieces: dict[MatrixKey, list[tuple[int, Rectangle]]] = {key: [] for key in flops}
    shapes: dict[MatrixKey, tuple[int, int]] = {}
    for rank, parts in enumerate(parts_by_rank):
        for part in parts:
            pieces[part.key].append((rank, part.rectangle))
            shapes[part.key] = part.shape
    return [HeldMatrix(key, shapes[key], cost, tuple(pieces[key])) for key, cost in flops.items()]
