"""Weights on their way from the owners to everyone: behind the rest of the step, and behind the next forward."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_muon.sharding.collectives import Gathering, Piece, in_chunks
from lightning_muon.sharding.in_flight import arrive, can_depart, depart
from lightning_muon.sharding.ownership import Slice

__all__ = ["WeightPublisher"]


@dataclass(frozen=True)
class _Exchange:
    """Parameters of one dtype and device, gathered together.

    Attributes:
        pieces: What every rank owns of them.
    """

    pieces: tuple[tuple[Piece[nn.Parameter], ...], ...]

    def sizes(self) -> list[int]:
        """Elements that each rank sends."""
        return [sum(stop - start for _, start, stop in owned) for owned in self.pieces]


class WeightPublisher:
    """Gathers the owned slices of a set of parameters, bit for bit, in stages.

    Args:
        slices: Ascending slices of every parameter, in the order in which the next forward needs the parameters; the
            same on all ranks.
        group: The process group; `None` is the default one.
        overlap: Whether a parameter whose weights are on their way waits for them when it is read. Without that,
            `finish` must be called before anybody reads.
        share_bytes: What a rank sends in one stage, about: small enough to be on its way early, large enough to batch
            matrices and to fill a link.
        tell: What to do with a sentence for the user, on every rank.

    Attributes:
        stages: The parameters of each stage.
    """

    def __init__(
        self,
        slices: Mapping[nn.Parameter, Sequence[Slice]],
        group: dist.ProcessGroup | None,
        overlap: bool,
        share_bytes: int,
        tell: Callable[[str], None],
    ) -> None:
        self.group, self.tell = group, tell
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.overlap = overlap and all(can_depart(param) for param in slices)
        if self.overlap:
            # A parameter in flight changes its class and stays in its dictionary, where compiled code would not look
            # again (torch 2.11): it would read the weights of the last step.
            torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False
        self.stages = _stages(slices, self.world_size, share_bytes)
        self._exchanges = [_exchanges(stage, slices, group) for stage in self.stages]
        self._flights: list[_Flight] = []
        _publishers.add(self)

    @torch.no_grad()
    def publish(self, stage: int) -> None:
        """Send a stage's weights, which this rank has updated, and start to receive the others'."""
        if self.world_size == 1:
            return
        flight = _Flight(self, stage)
        for exchange in self._exchanges[stage]:
            own = [_flat(param)[start:stop] for param, start, stop in exchange.pieces[self.rank]]
            param = next(param for owned in exchange.pieces for param, _, _ in owned)
            sent = torch.cat(own) if own else param.new_empty(0)
            flight.gatherings.append((exchange, Gathering(sent, exchange.sizes(), self.group)))
        self._flights.append(flight)
        if self.overlap:
            for param in self.stages[stage]:
                depart(param, flight)

    def finish(self) -> None:
        """Wait for all weights."""
        while self._flights:
            self._flights[0].land()
            self._flights.pop(0)


# A process that is forked while weights travel does not have the threads that would bring them.
_publishers: weakref.WeakSet[WeightPublisher] = weakref.WeakSet()


def _finish_all() -> None:
    for publisher in list(_publishers):
        publisher.finish()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_finish_all)


class _Flight:
    """A stage on its way."""

    def __init__(self, publisher: WeightPublisher, stage: int) -> None:
        self.publisher, self.stage = publisher, stage
        self.gatherings: list[tuple[_Exchange, Gathering]] = []
        self._lock = threading.RLock()  # another thread may read, too

    def land(self) -> None:
        """Wait for the stage and write it into the parameters."""
        with self._lock:
            # Until everything is written the parameters stay in flight. Should a rank be lost, or the wait be
            # interrupted, to read one is an error or another wait, and never a weight of the last step.
            # A forward under inference_mode may be the first to read; the parameters are ordinary tensors all the same.
            with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False), torch.no_grad():
                for exchange, gathering in self.gatherings:
                    for rank, part in enumerate(gathering.wait()):
                        if rank != self.publisher.rank:
                            _write(exchange.pieces[rank], part)
            if self.gatherings:
                for param in self.publisher.stages[self.stage]:
                    arrive(param)
                self.gatherings = []

    def seen_by_compiler(self) -> None:
        """Compiled code checks its parameters' class: it would be compiled again for every step."""
        if self.publisher.overlap:
            self.publisher.overlap = False
            self.publisher.tell(
                "muon_zero1: torch.compile reads parameters, so that from now on new weights arrive within the step."
            )


def _stages(
    slices: Mapping[nn.Parameter, Sequence[Slice]], world_size: int, share_bytes: int
) -> list[list[nn.Parameter]]:
    """Cut the parameters, in their order, where some rank's share reaches `share_bytes`."""
    stages: list[list[nn.Parameter]] = []
    filled = [share_bytes]
    for param, pieces in slices.items():
        if max(filled) >= share_bytes:
            stages.append([])
            filled = [0] * world_size
        stages[-1].append(param)
        for piece in pieces:
            filled[piece.owner] += (piece.stop - piece.start) * param.element_size()
    return stages


def _exchanges(
    stage: Sequence[nn.Parameter], slices: Mapping[nn.Parameter, Sequence[Slice]], group: dist.ProcessGroup | None
) -> list[_Exchange]:
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for param in stage:
        kinds.setdefault((param.dtype, param.device), []).append(param)
    exchanges = []
    for params in kinds.values():
        pieces: list[list[Piece[nn.Parameter]]] = [[] for _ in range(dist.get_world_size(group))]
        for param in params:
            for piece in slices[param]:
                pieces[piece.owner].append((param, piece.start, piece.stop))
        exchanges += [_Exchange(chunk) for chunk in in_chunks(pieces, params[0], group)]
    return exchanges


def _flat(param: nn.Parameter) -> Tensor:
    """`(numel,)` in the parameter's logical order; a copy if it is not contiguous."""
    return param.detach().reshape(-1)


def _write(pieces: Sequence[Piece[nn.Parameter]], values: Tensor) -> None:
    """Write the values, one piece after the other, into the parameters."""
    offset = 0
    for param, start, stop in pieces:
        new = values[offset : offset + stop - start]
        offset += stop - start
        if param.is_contiguous():
            param.detach().view(-1)[start:stop] = new
        else:  # a copy in the logical order, back through the strides
            flat = _flat(param)
            flat[start:stop] = new
            param.detach().copy_(flat.view_as(param))
