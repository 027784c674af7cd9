"""From an optimizer's routes to the plan of who owns what."""

from __future__ import annotations

from lightning_muon.muon import Muon
from lightning_muon.orthogonalize import nominal_sequence, orthogonalization_flops
from lightning_muon.sharding.ownership import ElementRun, OwnershipPlan, Unit, plan_ownership
from lightning_muon.updates import state_dtypes

__all__ = ["ownership_plan"]


def ownership_plan(optimizer: Muon, world_size: int) -> OwnershipPlan:
    """Plan who owns what, from the optimizer's routes."""
    units, runs = [], []
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            layout = optimizer.routes[name].layout
            dtypes = state_dtypes(group["algorithm"], param.dtype, optimizer.master_weights)
            itemsize = sum(dtype.itemsize for dtype in dtypes.values())
            if group["algorithm"] == "adamw" or layout is None:
                runs.append(ElementRun(name, param.numel(), itemsize, param.is_contiguous()))
                continue
            sequence = nominal_sequence(group["orthogonalization"])
            pieces = [
                Unit(
                    name,
                    block.start,
                    block.stop,
                    sum(orthogonalization_flops(*shape, sequence) for shape in block.shapes),
                    (block.stop - block.start) * itemsize,
                )
                for block in layout.blocks()
            ]
            if not param.is_contiguous():  # its elements have no common order that could be cut
                pieces = [
                    Unit(
                        name,
                        0,
                        param.numel(),
                        sum(p.flops for p in pieces),
                        sum(p.state_bytes for p in pieces),
                    )
                ]
            units += pieces
    return plan_ownership(units, runs, world_size)
