"""Optimizer state from its owners to one process."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_muon.partition import NamedState
from lightning_muon.sharding.collectives import global_rank
from lightning_muon.sharding.ownership import Slice

__all__ = ["consolidate"]


def consolidate(
    state: Mapping[str, Mapping[str, Tensor]],
    slices: Mapping[str, tuple[Slice, ...]],
    to: int,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> NamedState | None:
    """Assemble the whole state on the process ``to``, flat and in CPU memory. Every process must call it.

    Each owner sends one tensor per state key and dtype, so that ``to`` never holds more than the result and one
    rank's part; nothing is pickled but the sizes and ``step`` counts.

    Args:
        state: This rank's packed state of the parameters of which it owns something, by name.
        slices: The owners of all parameters.
        to: The rank (within ``group``) that gets everything.
        device: Where the group communicates.
        group: The process group; ``None`` is the default one.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    own = _numbers(state)
    layout = _kinds(state)
    packed = {
        kind: torch.cat([state[name][key].reshape(-1) for name, key in members]).to(device)
        for kind, members in layout.items()
    }
    gathered: list[tuple[dict[str, dict[str, float]], dict[tuple[str, torch.dtype], list[tuple[str, str]]]]] | None
    gathered = [({}, {})] * world_size if rank == to else None
    dist.gather_object((own, layout), gathered, dst=global_rank(group, to), group=group)
    if gathered is None:
        for kind in layout:
            dist.send(packed[kind], global_rank(group, to), group=group)
        return None
    whole: NamedState = {}
    for source, (numbers, kinds) in enumerate(gathered):
        for name, entries in numbers.items():
            for key, value in entries.items():
                whole.setdefault(name, {})[key] = torch.tensor(value)
        for (key, dtype), members in kinds.items():
            sizes = [_owned(slices[name], source) for name, _ in members]
            if source == rank:
                flat = packed[key, dtype]
            else:
                flat = torch.empty(sum(sizes), dtype=dtype, device=device)
                dist.recv(flat, global_rank(group, source), group=group)
            for (name, _), part in zip(members, torch.split(flat.cpu(), sizes), strict=True):
                numel = slices[name][-1].stop
                target = whole.setdefault(name, {}).setdefault(key, torch.empty(numel, dtype=dtype))
                offset = 0
                for piece in slices[name]:
                    if piece.owner == source:
                        length = piece.stop - piece.start
                        target[piece.start : piece.stop] = part[offset : offset + length]
                        offset += length
    return whole


def _numbers(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, float]]:
    return {
        name: {key: float(value) for key, value in entries.items() if not isinstance(value, Tensor)}
        for name, entries in state.items()
    }


def _kinds(state: Mapping[str, Mapping[str, Tensor]]) -> dict[tuple[str, torch.dtype], list[tuple[str, str]]]:
    kinds: dict[tuple[str, torch.dtype], list[tuple[str, str]]] = {}
    for name, entries in state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                kinds.setdefault((key, value.dtype), []).append((name, key))
    return kinds


def _owned(slices: tuple[Slice, ...], rank: int) -> int:
    return sum(piece.stop - piece.start for piece in slices if piece.owner == rank)
