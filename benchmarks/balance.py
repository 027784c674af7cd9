"""How even ``muon_zero1``'s ownership is, and what splitting the largest matrices over ranks could save.

``python -m benchmarks.balance [--json benchmarks/results/balance.json]``

Nothing is measured: the plans are computed, and times follow from FLOPs and an H200's reachable rate. Parameters are
bfloat16. With whole matrices no plan is faster than ``floor = max(total / N, largest matrix)``. Two ways below it:

- ``any split``: as if this work could be cut anywhere, at no cost: ``total / N``.
- ``Gram split``: the largest shapes are cut along their long side over 2, 4 or 8 ranks of one machine, whichever is
  best. With ``alpha = long / short``, the direct iteration of T steps takes ``T (4 alpha + 2) short³`` FLOPs. The Gram
  form takes, on each of k ranks, ``4 alpha short³ / k`` (the piece's part of the Gram matrix, and the polynomial times
  the piece), an all-reduce of the Gram matrix in float32 over NVLink, and ``(8 T - 6) short³`` for the polynomial,
  which every rank repeats. Counted without the restart that 16-bit iterations need and as if the pieces packed
  perfectly: what it saves is an upper bound.

Savings stand beside the model's own time, ``6 * active parameters * tokens / rate``, at 8,192 and 1,024 tokens per
rank. ``uneven bytes`` is the other cost of few matrices on many ranks: the time by which the busiest rank's gradients
and weights take longer than the mean rank's if every pair of ranks exchanges directly, at 400 Gbit/s per rank.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import MODELS, ModelShapes
from examples.moe_lm.environment import environment
from lightning_muon.orthogonalize import orthogonalization_flops, polynomial_sequence
from lightning_muon.planning.costs import Shape, costs_of_schemes
from lightning_muon.planning.devices import DEVICES
from lightning_muon.sharding.units import ownership_plan

WORLD_SIZES = (8, 64, 256, 512)
TOKENS = (8192, 1024)
RATE = DEVICES["h200"].flops
LINK = 400e9 / 8  # bytes/s each way: one 400 Gbit/s adapter per GPU
NVLINK = 450e9  # bytes/s each way: the H200's data sheet gives 900 GB/s for both
SEQUENCE = polynomial_sequence("polar_express5")  # lm.Muon's default


def gram_seconds(rows: int, cols: int, num_ranks: int) -> float:
    """One matrix by the Gram form, cut along its long side over so many ranks."""
    assert SEQUENCE is not None
    short, long = sorted((rows, cols))
    flops = 4 * short**2 * long / num_ranks + (8 * len(SEQUENCE.steps) - 6) * short**3
    all_reduce = 2 * (num_ranks - 1) / num_ranks * 4 * short**2
    return flops / RATE + all_reduce / NVLINK


def gram_makespan(matrices: dict[Shape, int], world_size: int) -> tuple[float, int]:
    """A bound on the slowest rank's seconds if the largest shapes are split, and over how many ranks each."""
    direct = {shape: orthogonalization_flops(*shape, SEQUENCE) / RATE for shape in matrices}
    largest_first = sorted(matrices, key=lambda shape: -direct[shape])
    bounds = []
    for num_ranks, count in itertools.product((2, 4, 8), range(1, len(matrices) + 1)):
        split = set(largest_first[:count])
        piece = {s: gram_seconds(*s, num_ranks) if s in split else direct[s] for s in matrices}
        total = sum(piece[s] * (num_ranks if s in split else 1) * matrices[s] for s in matrices)
        bounds.append((max(total / world_size, *piece.values()), num_ranks))
    return min(bounds)


def balance(model: ModelShapes, world_size: int) -> dict[str, Any]:
    """One line of the table; times in milliseconds."""
    optimizer = model.optimizer(torch.bfloat16)
    plan = ownership_plan(optimizer, world_size)
    schemes = costs_of_schemes(optimizer, plan)
    ours, matrices = schemes["muon_zero1"], dict(schemes["muon_ddp"][0].matrices)
    total, makespan = sum(plan.flops) / RATE, max(plan.flops) / RATE
    largest = max(orthogonalization_flops(*shape, SEQUENCE) for shape in matrices) / RATE
    gram, num_ranks = gram_makespan(matrices, world_size)
    saves = {"any_split": makespan - total / world_size, "gram_split": max(0.0, makespan - gram)}
    traffic = [(max(r.sent_gradients, r.received_gradients), max(r.sent_weights, r.received_weights)) for r in ours]
    busiest = sum(map(max, zip(*traffic, strict=True)))
    mean = 2 * sum(rank.sent_gradients for rank in ours) / world_size
    step = {tokens: 6 * model.active_parameters * tokens / RATE for tokens in TOKENS}
    return {
        "matrices": sum(matrices.values()),
        "flops_max_over_mean": makespan * world_size / total,
        "state_max_over_mean": max(plan.state_bytes) * world_size / sum(plan.state_bytes),
        "sent_max_over_mean": max(rank.sent for rank in ours) / mean,
        "makespan_ms": 1e3 * makespan,
        "floor_ms": 1e3 * max(total / world_size, largest),
        "total_over_n_ms": 1e3 * total / world_size,
        "largest_ms": 1e3 * largest,
        "model_ms": {tokens: 1e3 * seconds for tokens, seconds in step.items()},
        "saves_ms": {split: 1e3 * seconds for split, seconds in saves.items()},
        "saves_of_model": {
            split: {tokens: seconds / step[tokens] for tokens in TOKENS} for split, seconds in saves.items()
        },
        "gram_split_ranks": num_ranks,
        "uneven_bytes_ms": 1e3 * (busiest - mean) / LINK,
    }


def main() -> None:
    """Compute and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    print(
        f"{'':24}{'max / mean':^24}{'Newton–Schulz, ms':^22}{'any split saves':^26}{'Gram split saves':^26}"
        f"{'uneven':>9}\n"
        f"{'':14}{'ranks':>6}{'FLOPs':>10}{'state':>8}{'sent':>8}{'slowest':>12}{'floor':>10}"
        + f"{'ms':>10}{'of 8k / 1k':>16}" * 2
        + f"{'bytes, ms':>11}"
    )
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for name, build in MODELS.items():
        model = build()
        results[name] = {world_size: balance(model, world_size) for world_size in WORLD_SIZES}
        for world_size, row in results[name].items():
            line = f"{name:14}{world_size:>6}{row['flops_max_over_mean']:>10.3f}{row['state_max_over_mean']:>8.3f}"
            line += f"{row['sent_max_over_mean']:>8.3f}{row['makespan_ms']:>12.2f}{row['floor_ms']:>10.2f}"
            for split, milliseconds in row["saves_ms"].items():
                shares = " / ".join(f"{share:.1%}" for share in row["saves_of_model"][split].values())
                line += f"{milliseconds:>10.2f}{shares:>16}"
            print(line + f"{row['uneven_bytes_ms']:>11.1f}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {
            "rate_flops_per_second": RATE,
            "nvlink_bytes_per_second": NVLINK,
            "link_bytes_per_second": LINK,
            "models": results,
        }
        options.json.write_text(json.dumps({**figures, **environment()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
