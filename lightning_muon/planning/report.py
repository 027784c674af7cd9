"""The figures of a plan, for JSON, and the same as a table to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_muon.muon import Muon
from lightning_muon.planning.costs import (
    SCHEMES,
    RankCosts,
    Shape,
    costs_of_schemes,
    matrices_of,
    trained_parameters,
)
from lightning_muon.planning.exposed import Speeds, exposed_time, optimizer_seconds
from lightning_muon.sharding.ownership import OwnershipPlan
from lightning_muon.sharding.units import ownership_plan

__all__ = ["figures", "table"]

# Ranks that the table lists; JSON has them all.
_MAX_ROWS = 16


def figures(optimizer: Muon, world_size: int, speeds: Speeds, model: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is known of the plan, as plain numbers: bytes, FLOPs, seconds.

    Args:
        optimizer: The optimizer; not sharded.
        world_size: Number of ranks.
        speeds: What the times assume.
        model: What to say of the model, beside the counts that follow from the optimizer.
    """
    plan = ownership_plan(optimizer, world_size)
    parameters = trained_parameters(optimizer)
    schemes = costs_of_schemes(optimizer, plan)
    muon = sum(parameter.numel for parameter in parameters if parameter.layout is not None)
    return {
        "model": {
            **model,
            "trained_parameters": sum(parameter.numel for parameter in parameters),
            "muon_parameters": muon,
            "matrices": sum(parameter.layout.num_matrices for parameter in parameters if parameter.layout),
            "parameter_bytes": sum(parameter.numel * parameter.itemsize for parameter in parameters),
        },
        "world_size": world_size,
        "speeds": {
            "device": speeds.device.name,
            "flops_per_second": speeds.device.flops,
            "memory_bytes_per_second": speeds.device.memory_bandwidth,
            "link_bytes_per_second": speeds.link,
            "tokens_per_rank": speeds.tokens_per_rank,
            "active_parameters": speeds.active_parameters,
        },
        "schemes": {name: _scheme(name, ranks, speeds) for name, ranks in schemes.items()},
        "owned": _owned(optimizer, plan),
    }


def _scheme(name: str, ranks: Sequence[RankCosts], speeds: Speeds) -> dict[str, Any]:
    exposed = exposed_time(name, ranks, speeds)
    model_seconds = speeds.forward + speeds.backward
    return {
        "state_bytes": _spread([rank.state_bytes for rank in ranks]),
        "sent_bytes": _spread([rank.sent for rank in ranks]),
        "received_bytes": _spread([rank.received for rank in ranks]),
        "newton_schulz_flops": _spread([rank.flops for rank in ranks]),
        "seconds": {
            "gradients": exposed.gradients,
            "optimizer": exposed.optimizer,
            "weights": exposed.weights,
            "exposed": exposed.total,
            "step": model_seconds + exposed.total if speeds.tokens_per_rank else None,
        },
        "ranks": [
            {
                "rank": number,
                "elements": rank.elements,
                "state_bytes": rank.state_bytes,
                "sent_bytes": rank.sent,
                "received_bytes": rank.received,
                "sent_gradient_bytes": rank.sent_gradients,
                "received_gradient_bytes": rank.received_gradients,
                "sent_weight_bytes": rank.sent_weights,
                "received_weight_bytes": rank.received_weights,
                "newton_schulz_flops": rank.flops,
                "optimizer_seconds": optimizer_seconds(rank, speeds.device),
                "matrices": _by_shape(rank.matrices),
            }
            for number, rank in enumerate(ranks)
        ],
    }


def _spread(values: Sequence[int]) -> dict[str, float]:
    mean = sum(values) / len(values)
    return {
        "sum": sum(values),
        "mean": mean,
        "largest": max(values),
        "largest_over_mean": max(values) / mean if mean else 1.0,
    }


def _by_shape(matrices: Mapping[Shape, int]) -> dict[str, int]:
    costly_first = sorted(matrices.items(), key=lambda item: (-item[1] * item[0][0] * item[0][1], item[0]))
    return {f"{rows}x{cols}": count for (rows, cols), count in costly_first}


def _owned(optimizer: Muon, plan: OwnershipPlan) -> list[list[dict[str, Any]]]:
    """For each rank, the runs of elements it owns under ``muon_zero1``, with the number of matrices in each."""
    owned: list[list[dict[str, Any]]] = [[] for _ in range(plan.world_size)]
    for parameter in trained_parameters(optimizer):
        slices = plan.slices[parameter.name]
        held = matrices_of(parameter.layout, slices) if parameter.layout else [Counter[Shape]()] * len(slices)
        for piece, matrices in zip(slices, held, strict=True):
            owned[piece.owner].append(
                {
                    "parameter": parameter.name,
                    "start": piece.start,
                    "stop": piece.stop,
                    "matrices": sum(matrices.values()),
                }
            )
    return owned


def table(found: Mapping[str, Any]) -> str:
    """What ``figures`` found, as text."""
    model, speeds, schemes = found["model"], found["speeds"], found["schemes"]
    trained, muon = model["trained_parameters"], model["muon_parameters"]
    lines = [
        f"{model['source']}: {trained:,} trained parameters, {model['frozen_parameters']:,} frozen, {model['dtype']}",
        f"optimizer {model['optimizer']}: Muon trains {muon:,} in {model['matrices']:,} matrices, AdamW"
        f" {trained - muon:,}",
        f"{found['world_size']} ranks; {speeds['device']}: {speeds['flops_per_second'] / 1e12:,.4g} TFLOP/s, memory"
        f" {speeds['memory_bytes_per_second'] / 1e9:,.4g} GB/s; link {8 * speeds['link_bytes_per_second'] / 1e9:,.4g}"
        " Gbit/s each way",
    ]
    if speeds["tokens_per_rank"]:
        lines.append(
            f"{speeds['tokens_per_rank']:,} tokens per rank and step, {speeds['active_parameters']:,} active parameters"
        )
    ours = schemes["muon_zero1"]
    largest_over_mean = ours["newton_schulz_flops"]["largest_over_mean"]
    lines += [
        "",
        *_columns([("per rank and step", *SCHEMES.values()), *_comparison(list(schemes.values()))]),
        "",
        "AdamW, ZeRO-1 is torch's ZeroRedundancyOptimizer under DDP. Exposed: what backward and the next forward do not"
        " hide" + ("." if speeds["tokens_per_rank"] else "; without --tokens-per-rank, nothing is hidden."),
        "",
        f"muon_zero1, rank by rank; largest / mean: Newton–Schulz {largest_over_mean:.3f}, state"
        f" {ours['state_bytes']['largest_over_mean']:.3f}",
        *_columns(_rank_rows(ours["ranks"][:_MAX_ROWS])),
    ]
    if found["world_size"] > _MAX_ROWS:
        lines.append(f"… and {found['world_size'] - _MAX_ROWS} more ranks; --json has them all, and each by name.")
    return "\n".join(lines)


def _comparison(schemes: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    quantities = [("state", "state_bytes", _bytes), ("sent", "sent_bytes", _bytes)]
    quantities += [("received", "received_bytes", _bytes), ("Newton–Schulz", "newton_schulz_flops", _flops)]
    for title, key, as_text in quantities:
        for of_ranks in ("mean", "largest"):
            rows.append((f"{title}, {of_ranks}", *as_text([scheme[key][of_ranks] for scheme in schemes])))
    times = {"gradients": "exposed: gradients", "optimizer": "exposed: optimizer", "weights": "exposed: weights"}
    times |= {"exposed": "exposed, together", "step": "whole step"}
    for key, title in times.items():
        if schemes[0]["seconds"][key] is not None:
            rows.append((title, *(_ms(scheme["seconds"][key]) for scheme in schemes)))
    return rows


def _rank_rows(ranks: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    matrices = [", ".join(f"{count} of {shape}" for shape, count in rank["matrices"].items()) for rank in ranks]
    columns = {
        "rank": [str(rank["rank"]) for rank in ranks],
        "state": _bytes([rank["state_bytes"] for rank in ranks]),
        "sent": _bytes([rank["sent_bytes"] for rank in ranks]),
        "received": _bytes([rank["received_bytes"] for rank in ranks]),
        "Newton–Schulz": _flops([rank["newton_schulz_flops"] for rank in ranks]),
        "optimizer": [_ms(rank["optimizer_seconds"]) for rank in ranks],
        "matrices": [text or "none" for text in matrices],
    }
    return [tuple(columns), *zip(*columns.values(), strict=True)]


def _bytes(values: Sequence[float]) -> list[str]:
    """In one unit, so that they compare at a glance."""
    unit, name = (2**30, "GiB") if max(values) >= 10 * 2**30 else (2**20, "MiB")
    return [f"{value / unit:,.2f} {name}" for value in values]


def _flops(values: Sequence[float]) -> list[str]:
    unit, name = (1e12, "TFLOP") if max(values) >= 1e12 else (1e9, "GFLOP")
    return [f"{value / unit:,.3f} {name}" for value in values]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as aligned text: the first column and ``matrices`` to the left, figures to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column == 0 or rows[0][column] == "matrices" else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
