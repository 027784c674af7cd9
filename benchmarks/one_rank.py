"""One rank of 8, 64 and 512, in one process: memory and time of its optimizer step on large models.

``python -m benchmarks.one_rank [--device cpu] [--max-teraflops 3] [--json benchmarks/results/one_rank_cpu.json]``

The rank with the most Newton–Schulz work of ``muon_zero1``'s plan runs its part of ``lm.Muon.step`` on bfloat16 weights
and gradients with the shapes of Moonlight-16B and Llama-7B. The process group is torch's fake one, so that collectives
cost nothing; reduction of gradients and gathering of weights are not part of the step. What other ranks own is
allocated and never touched: on a CPU it takes no memory.

A CPU cannot do all of it in reasonable time. Where the rank's work is above ``--max-teraflops``, every k-th of its
matrices is run, and every k-th element of what AdamW trains; the table says which part of the work and of the state
that is, and the figures are of that part. A single matrix is never cut.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import lightning_muon as lm
from benchmarks.shapes import MODELS
from examples.moe_lm.environment import environment
from lightning_muon.orthogonalize import orthogonalization_flops, polynomial_sequence
from lightning_muon.partition import Alone, Range
from lightning_muon.sharding.ownership import OwnershipPlan
from lightning_muon.sharding.units import ownership_plan


class OneRank(Alone):
    """Every k-th matrix of one rank, and the first of every k elements that AdamW trains; nobody answers.

    Args:
        optimizer: The optimizer; not sharded.
        plan: Who owns what.
        rank: The rank.
        stride: k.
    """

    is_sharded = True

    def __init__(self, optimizer: lm.Muon, plan: OwnershipPlan, rank: int, stride: int) -> None:
        self.rank, self.world_size = rank, plan.world_size
        self.flops = self.matrices = 0
        self._ranges: dict[str, list[Range]] = {}
        sequence = polynomial_sequence("polar_express5")
        number = 0
        for name, slices in plan.slices.items():
            own = [(piece.start, piece.stop) for piece in slices if piece.owner == rank]
            route = optimizer.routes[name]
            if route.algorithm == "adamw" or route.layout is None:
                self._ranges[name] = [(start, start + math.ceil((stop - start) / stride)) for start, stop in own]
                continue
            kept: list[Range] = []
            for block in route.layout.blocks():
                if any(start <= block.start < stop for start, stop in own):
                    if number % stride == 0:
                        kept.append((block.start, block.stop))
                        self.flops += sum(orthogonalization_flops(*shape, sequence) for shape in block.shapes)
                        self.matrices += len(block.shapes)
                    number += 1
            self._ranges[name] = kept

    def ranges(self, name: str, numel: int) -> list[Range]:
        """What is run of a parameter."""
        return self._ranges[name]

    def maximum(self, values: Tensor) -> Tensor:
        """As the strategy does, over the fake group."""
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values


def measure(name: str, world_size: int, device: str, max_teraflops: float, rounds: int) -> dict[str, Any]:
    """One line of the table; in a process of its own, so that its memory is its own."""
    shapes = MODELS[name]()
    plan = ownership_plan(shapes.optimizer(torch.bfloat16), world_size)
    rank = max(range(world_size), key=lambda r: plan.flops[r])
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    named = [
        (name, torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device=device)))
        for name, shape in shapes.shapes.items()
    ]
    optimizer = lm.Muon(named)
    stride = max(1, math.ceil(plan.flops[rank] / (1e12 * max_teraflops)))
    part = OneRank(optimizer, plan, rank, stride)
    optimizer.shard(part)
    for name, param in optimizer.named_parameters():
        param.grad = torch.empty_like(param)
        for start, stop in part.ranges(name, param.numel()):
            param.detach().view(-1)[start:stop].normal_(std=0.02)
            param.grad.view(-1)[start:stop].normal_()
    before = _memory(device)
    seconds = []
    for _ in range(rounds + 1):
        start_time = time.perf_counter()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start_time)
    low, median, high = statistics.quantiles(seconds[1:], n=4)  # the first one warms up
    dist.destroy_process_group()
    state_bytes = optimizer.local_state_bytes()
    assert stride > 1 or (part.flops, state_bytes) == (plan.flops[rank], plan.state_bytes[rank])
    return {
        "rank": rank,
        "stride": stride,
        "matrices_run": part.matrices,
        "teraflops_run": part.flops / 1e12,
        "teraflops_of_rank": plan.flops[rank] / 1e12,
        "state_bytes_run": state_bytes,
        "state_bytes_of_rank": plan.state_bytes[rank],
        "working_bytes_run": _memory(device, peak=True) - before,
        "seconds": {"median": median, "quartiles": [low, high], "rounds": rounds},
    }


def _memory(device: str, *, peak: bool = False) -> int:
    """Bytes that the process holds on the device, or has held at most."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if peak:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-teraflops", type=float, default=None, help="default: 3 on a CPU, no limit on a GPU")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["Moonlight-16B", "Llama-7B"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    limit = options.max_teraflops or (3.0 if options.device == "cpu" else float("inf"))
    print(
        f"{'':14}{'ranks':>6}{'matrices':>9}{'of the work':>12}{'TFLOP':>8}{'state MiB':>11}{'of all':>8}"
        f"{'working MiB':>12}{'step s':>9}{'quartiles':>17}{'TFLOP/s':>9}"
    )
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for name in options.models:
        for world_size in options.world_sizes:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                arguments = (name, world_size, options.device, limit, options.rounds)
                row = process.submit(measure, *arguments).result()
            results.setdefault(name, {})[world_size] = row
            median, (low, high) = row["seconds"]["median"], row["seconds"]["quartiles"]
            print(
                f"{name:14}{world_size:>6}{row['matrices_run']:>9}"
                f"{row['teraflops_run'] / row['teraflops_of_rank']:>12.1%}{row['teraflops_run']:>8.2f}"
                f"{row['state_bytes_run'] / 2**20:>11.1f}{row['state_bytes_run'] / row['state_bytes_of_rank']:>8.1%}"
                f"{row['working_bytes_run'] / 2**20:>12.1f}{median:>9.3f}{f'{low:.3f} – {high:.3f}':>17}"
                f"{row['teraflops_run'] / median:>9.3f}",
                flush=True,
            )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        gpu = {"gpu": torch.cuda.get_device_name()} if options.device == "cuda" else {}
        figures = {"device": options.device, "max_teraflops": limit, "models": results, **gpu, **environment()}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
