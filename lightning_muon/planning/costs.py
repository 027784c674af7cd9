"""What each rank keeps, sends and computes in a step: pure functions of sizes and of an ownership plan.

Bytes are the payload that is handed to the collectives; between two machines that is what goes over the wire, up to
headers. Not counted: the few numbers that clipping and the check for finite gradients exchange, DDP's broadcast of
buffers, and AdamW's step counters.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_muon.matrices import MatrixLayout
from lightning_muon.muon import Muon
from lightning_muon.sharding.ownership import OwnershipPlan, Slice
from lightning_muon.sharding.units import ownership_plan

__all__ = ["SCHEMES", "RankCosts", "Shape", "TrainedParameter", "costs_of_schemes", "matrices_of", "trained_parameters"]

SCHEMES = {
    "adamw_ddp": "AdamW, DDP",
    "adamw_zero1": "AdamW, ZeRO-1",
    "muon_ddp": "Muon, DDP",
    "muon_zero1": "muon_zero1",
}

Shape = tuple[int, int]


@dataclass(frozen=True)
class TrainedParameter:
    """A parameter of the optimizer.

    Attributes:
        name: Its name.
        numel: Its elements.
        itemsize: Bytes of an element; the gradient has the same.
        layout: The matrices that Muon orthogonalises; ``None`` if AdamW trains it.
    """

    name: str
    numel: int
    itemsize: int
    layout: MatrixLayout | None


@dataclass(frozen=True)
class RankCosts:
    """One rank's part of a step.

    Attributes:
        elements: Elements it updates.
        weight_bytes: Bytes of these elements.
        state_bytes: Bytes of optimizer state it keeps.
        flops: Newton–Schulz FLOPs.
        sent_gradients, received_gradients, sent_weights, received_weights: Bytes; under DDP alone everything that is
            sent is a gradient, although the second half of an all-reduce carries averages.
        matrices: The matrices it orthogonalises, by stored shape.
    """

    elements: int
    weight_bytes: int
    state_bytes: int
    flops: int
    sent_gradients: int
    received_gradients: int
    sent_weights: int
    received_weights: int
    matrices: Mapping[Shape, int] = field(default_factory=dict)

    @property
    def sent(self) -> int:
        """All bytes sent."""
        return self.sent_gradients + self.sent_weights

    @property
    def received(self) -> int:
        """All bytes received."""
        return self.received_gradients + self.received_weights


def trained_parameters(optimizer: Muon) -> list[TrainedParameter]:
    """The optimizer's parameters, each with its matrices if Muon trains it."""
    return [
        TrainedParameter(
            name,
            param.numel(),
            param.dtype.itemsize,
            optimizer.routes[name].layout if optimizer.routes[name].algorithm == "muon" else None,
        )
        for name, param in optimizer.named_parameters()
    ]


def costs_of_schemes(optimizer: Muon, plan: OwnershipPlan) -> dict[str, tuple[RankCosts, ...]]:
    """The costs of every rank under every scheme, by the names of ``SCHEMES``.

    Args:
        optimizer: The optimizer; not sharded.
        plan: Who owns what under ``muon_zero1``, from ``lightning_muon.sharding.units.ownership_plan``.
    """
    parameters = trained_parameters(optimizer)
    alone = _muon_zero1(parameters, ownership_plan(optimizer, 1))[0]
    return {
        "adamw_ddp": _adamw_ddp(parameters, plan.world_size),
        "adamw_zero1": _adamw_zero1(parameters, plan.world_size),
        "muon_ddp": _replicated(alone, plan.world_size),
        "muon_zero1": _muon_zero1(parameters, plan),
    }


def owner_traffic(owned_bytes: Sequence[int], rank: int) -> tuple[int, int, int, int]:
    """What reduce-scatter to owners and all-gather from owners move, exactly and without padding.

    A rank sends its gradients of all that others own, and receives everybody's of what it owns; it sends the weights
    it owns to everybody, and receives all others.

    Args:
        owned_bytes: Bytes of the elements that each rank owns, in the parameters' dtype.
        rank: Whose traffic.

    Returns:
        Bytes of gradients sent, gradients received, weights sent, weights received.
    """
    own = owned_bytes[rank]
    of_others = sum(owned_bytes) - own
    to_everybody = (len(owned_bytes) - 1) * own
    return of_others, to_everybody, to_everybody, of_others


def all_reduce_traffic(num_bytes: int, world_size: int) -> int:
    """Bytes that each rank sends, and receives, in an all-reduce: ``2(N-1)/N`` of them, rounded."""
    return round(2 * (world_size - 1) * num_bytes / world_size)


def matrices_of(layout: MatrixLayout, slices: Sequence[Slice]) -> list[Counter[Shape]]:
    """The matrices in each of a parameter's slices (ascending, covering it), by stored shape."""
    found: list[Counter[Shape]] = [Counter() for _ in slices]
    number = 0
    for block in layout.blocks():
        while block.start >= slices[number].stop:
            number += 1
        found[number].update(block.shapes)
    return found


def _muon_zero1(parameters: Sequence[TrainedParameter], plan: OwnershipPlan) -> tuple[RankCosts, ...]:
    ranks = range(plan.world_size)
    elements, owned_bytes = [0 for _ in ranks], [0 for _ in ranks]
    matrices: list[Counter[Shape]] = [Counter() for _ in ranks]
    for parameter in parameters:
        slices = plan.slices[parameter.name]
        for piece in slices:
            elements[piece.owner] += piece.stop - piece.start
            owned_bytes[piece.owner] += (piece.stop - piece.start) * parameter.itemsize
        for piece, held in zip(slices, matrices_of(parameter.layout, slices) if parameter.layout else (), strict=False):
            matrices[piece.owner] += held
    return tuple(
        RankCosts(
            elements[rank],
            owned_bytes[rank],
            plan.state_bytes[rank],
            plan.flops[rank],
            *owner_traffic(owned_bytes, rank),
            matrices[rank],
        )
        for rank in ranks
    )


def _replicated(alone: RankCosts, world_size: int) -> tuple[RankCosts, ...]:
    """Every rank does what one process would do, and DDP averages the gradients."""
    traffic = all_reduce_traffic(alone.weight_bytes, world_size)
    costs = RankCosts(
        alone.elements, alone.weight_bytes, alone.state_bytes, alone.flops, traffic, traffic, 0, 0, alone.matrices
    )
    return (costs,) * world_size


def _adamw_ddp(parameters: Sequence[TrainedParameter], world_size: int) -> tuple[RankCosts, ...]:
    elements = sum(parameter.numel for parameter in parameters)
    weight_bytes = sum(parameter.numel * parameter.itemsize for parameter in parameters)
    return _replicated(RankCosts(elements, weight_bytes, 2 * weight_bytes, 0, 0, 0, 0, 0), world_size)


def _adamw_zero1(parameters: Sequence[TrainedParameter], world_size: int) -> tuple[RankCosts, ...]:
    """``torch.distributed.optim.ZeroRedundancyOptimizer(AdamW)`` under DDP: what a Lightning user can have today.

    DDP all-reduces the whole gradient; each rank updates whole parameters and broadcasts them. A broadcast is counted
    as handing a copy to each of the others.
    """
    largest_first = sorted(parameters, key=lambda parameter: -parameter.numel)
    elements, owned_bytes = [0] * world_size, [0] * world_size
    smallest = [(0, rank) for rank in range(world_size)]
    for parameter in largest_first:  # its greedy partition: to the rank with the fewest elements so far
        filled, rank = smallest[0]
        heapq.heapreplace(smallest, (filled + parameter.numel, rank))
        elements[rank] += parameter.numel
        owned_bytes[rank] += parameter.numel * parameter.itemsize
    traffic = all_reduce_traffic(sum(owned_bytes), world_size)
    ranks = []
    for rank, own in enumerate(owned_bytes):
        _, _, sent, received = owner_traffic(owned_bytes, rank)
        ranks.append(RankCosts(elements[rank], own, 2 * own, 0, traffic, traffic, sent, received))
    return tuple(ranks)
