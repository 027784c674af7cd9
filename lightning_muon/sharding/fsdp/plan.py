"""Stages of parameters, and what travels in each: a pure function of routes, options and what every rank holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_muon.matrices import MatrixKey
from lightning_muon.muon import Muon
from lightning_muon.orthogonalize import nominal_sequence, orthogonalization_flops
from lightning_muon.sharding.fsdp.shards import Shard
from lightning_muon.sharding.fsdp.transfers import Loads, StageTransfers, held_matrices, plan_stage

__all__ = ["ShardPlan", "plan_shards"]


@dataclass(frozen=True)
class ShardPlan:
    """The plan.

    Attributes:
        stages: Names of parameters whose matrices travel together, in the order of the steps. What AdamW updates is in
            the first: it has time while matrices travel.
        transfers: What travels in each stage.
        loads: What each rank has to do, over all stages.
    """

    stages: Sequence[Sequence[str]]
    transfers: Sequence[StageTransfers]
    loads: Loads

    @property
    def keys(self) -> list[MatrixKey]:
        """All matrices."""
        return [key for stage in self.transfers for key in stage.owners]

    def sent(self, rank: int, world_size: int) -> int:
        """Elements that a rank sends in a step, to owners and back."""
        return sum(t.to_owners(rank, world_size).sent + t.back(rank, world_size).sent for t in self.transfers)


def plan_shards(
    optimizer: Muon, held: Mapping[str, Sequence[Shard]], hosts: Sequence[object], stage_bytes: int
) -> ShardPlan:
    """Plan the stages of an optimizer.

    Args:
        optimizer: The optimizer, for its routes and options.
        held: What every rank holds of each parameter; the order of the parameters is that of the plan.
        hosts: The machine of each rank.
        stage_bytes: What a rank sends to owners in one stage, about, in float32.

    Raises:
        ValueError: What the ranks hold of a matrix does not make it up.
    """
    loads = Loads.none(len(hosts))
    sequences = {
        name: nominal_sequence(group["orthogonalization"])
        for group in optimizer.param_groups
        if group["algorithm"] == "muon"
        for name in group["param_names"]
    }
    stages = _stages(optimizer, held, sequences, stage_bytes)
    transfers = []
    for stage in stages:
        layouts = {name: layout for name in stage if name in sequences and (layout := optimizer.routes[name].layout)}
        flops = {
            (name, number): orthogonalization_flops(*shape, sequences[name])
            for name, layout in layouts.items()
            for number, shape in enumerate(layout.shapes())
        }
        parts = [
            [part for name, layout in layouts.items() for part in held[name][rank].parts(name, layout)]
            for rank in range(len(hosts))
        ]
        try:
            transfers.append(plan_stage(held_matrices(parts, flops), hosts, loads))
        except ValueError as error:
            raise ValueError(
                f"What the ranks hold of {', '.join(layouts)} does not make up the matrices: {error}"
            ) from None
    return ShardPlan(stages, transfers, loads)


def _stages(
    optimizer: Muon, held: Mapping[str, Sequence[Shard]], muon: Mapping[str, object], stage_bytes: int
) -> list[list[str]]:
    """Cut the Muon parameters where the largest shard reaches `stage_bytes`; a stage is of one dtype."""
    stages: list[list[str]] = [[name for name in held if name not in muon]]
    params = dict(optimizer.named_parameters())
    kinds: dict[torch.dtype, list[str]] = {}
    for name in held:
        if name in muon:
            kinds.setdefault(torch.promote_types(params[name].dtype, torch.float32), []).append(name)
    filled = 0
    for number, names in enumerate(kinds.values()):
        for place, name in enumerate(names):
            if filled >= stage_bytes or (number and not place):
                stages.append([])
                filled = 0
            stages[-1].append(name)
            filled += 4 * max(shard.numel for shard in held[name])
    return stages
