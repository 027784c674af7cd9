"""The ranks tell each other what they hold, before anything is planned on it."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from lightning_muon.muon import Muon
from lightning_muon.sharding.agreement import choices
from lightning_muon.sharding.fsdp.shards import Shard, shard_of

__all__ = ["Announcement", "announce"]


@dataclass(frozen=True)
class Announcement:
    """What a rank tells the others about itself.

    Attributes:
        host: Its machine.
        facts: What must be the same on all ranks, by what it is about.
        shards: What it holds of every parameter.
        problem: What cannot be served; empty if there is nothing.
    """

    host: str
    facts: Mapping[str, object]
    shards: Mapping[str, Shard]
    problem: str


def announce(optimizer: Muon, options: Mapping[str, object], group: dist.ProcessGroup | None) -> list[Announcement]:
    """Tell the other ranks what this one holds, and make sure that all of it fits together. Every rank must call it.

    Args:
        optimizer: The optimizer.
        options: Further facts that must be the same on all ranks.
        group: The process group; ``None`` is the default one.

    Returns:
        What each rank told, by rank.

    Raises:
        ValueError: A rank holds a parameter in a way that Muon cannot bring together; on every rank.
        RuntimeError: The ranks disagree; on every rank.
    """
    facts: dict[str, object] = {**options, **choices(optimizer)}
    shards, problems = {}, []
    for name, param in optimizer.named_parameters():
        layout = optimizer.routes[name].layout
        facts[f"parameter {name!r}"] = (str(param.dtype), tuple(param.shape), repr(layout))
        try:
            shards[name] = shard_of(param)
            if layout is not None:
                shards[name].parts(name, layout)
        except ValueError as error:
            problems.append(f"{name!r}: {error}")
    own = Announcement(socket.gethostname(), facts, shards, "; ".join(problems))
    announced = [own] * dist.get_world_size(group)
    dist.all_gather_object(announced, own, group=group)
    for rank, one in enumerate(announced):
        if one.problem:
            raise ValueError(
                f"Rank {rank} holds parameters in a way that Muon cannot bring together: {one.problem}. What it can:"
                " rows (dimension 0) and columns of matrices, sharded by FSDP and tensor parallelism, and replicas."
            )
    for rank, one in enumerate(announced):
        first = announced[0].facts
        differing = [key for key in {**first, **one.facts} if first.get(key) != one.facts.get(key)]
        if differing:
            shown = "; ".join(f"{key}: {first.get(key)} and {one.facts.get(key)}" for key in differing[:3])
            raise RuntimeError(
                f"Ranks 0 and {rank} disagree about {len(differing)} of their parameters and policies, among them"
                f" {shown}. Build the model, the optimizer and the strategy in the same way on every rank."
            )
    return announced
