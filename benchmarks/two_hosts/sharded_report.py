"""The optimizer's step by itself, where the weights are sharded: the table, and what has to be reached."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

__all__ = ["print_updates", "sharded_limits"]

# Ours, and the Muons whose matrices travel in the same dtype.
_RIVALS = {
    "muon_fsdp": ("fsdp2_muon_fsdp2", "fsdp2_torch_muon_f32"),
    "muon_fsdp_bf16": ("fsdp2_dion", "fsdp2_torch_muon"),
}


def sharded_limits(rows: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """What is compared, ours over a rival's, and at most what it may be: bytes, collectives and times. Times are
    compared block by block: those of a round have seen the same machine."""
    found = []
    for ours, rivals in _RIVALS.items():
        for rival in rivals:
            if ours not in rows or rival not in rows:
                continue
            mine, other = rows[ours], rows[rival]
            update, others_update = mine["update"], other["update"]
            ratios = {
                "bytes of the optimizer's step": update["sent_parameter_bytes"] / others_update["sent_parameter_bytes"],
                "collectives of the optimizer's step": update["num_collectives"] / others_update["num_collectives"],
                "optimizer's step": _ratio(update, others_update),
                "whole step": _ratio(mine, other),
            }
            found += [(f"{what}, {ours} / {rival}", ratio, 1.0) for what, ratio in ratios.items()]
    return found


def _ratio(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    pairs = zip(one["step_seconds_by_block"], other["step_seconds_by_block"], strict=True)
    return float(statistics.median(mine / theirs for mine, theirs in pairs))


def print_updates(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """The optimizer's step of the variants where it can be told apart."""
    updates = {name: row["update"] for name, row in rows.items() if "update" in row}
    if not updates:
        return
    print(f"{'the optimizer’s step':24}{'s':>8}{'from – to':>16}{'sent':>8}{'received':>10}{'collectives':>13}")
    for name, update in updates.items():
        seconds = update["step_seconds_by_block"]
        print(
            f"{name:24}{update['step_seconds']:>8.3f}{f'{min(seconds):.3f} – {max(seconds):.3f}':>16}"
            f"{update['sent_parameter_bytes']:>8.4f}{update['received_parameter_bytes']:>10.4f}"
            f"{update['num_collectives']:>13}"
        )
