"""A training step on 1 to 8 processes of one machine, and what a process holds: DDP, ``muon_zero1``, ``muon_fsdp``.

``python -m benchmarks.strategies [--json benchmarks/results/strategies.json]``

The example's model. The global batch is the same on any number of processes. The variants take turns within one group
of processes. Each turn is a few steps and a read of all weights, so that a gathering of weights that overlaps the next
step is counted. One thread per process; more processes than cores share them. Memory is the bytes of the tensors that
a process really holds after a backward, weights, gradients and optimizer state, of the process with the most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import lightning_muon as lm
from benchmarks.claims.markdown import table
from benchmarks.timing import time_alternating, write
from benchmarks.two_hosts.fsdp import cpu_mesh
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.environment import environment
from examples.moe_lm.model import MoELM, next_token_nll
from lightning_muon.local import local
from lightning_muon.sharding.fsdp import FSDPOptions
from lightning_muon.sharding.fsdp.fully_sharded import FullySharded
from lightning_muon.sharding.zero1 import Zero1

VARIANTS = ("AdamW, DDP", "Muon on every process, DDP", "muon_zero1", "muon_fsdp")
GLOBAL_BATCH = 16
SEQ_LEN = 128
STEPS_PER_TURN = 3
_MIB = 2**20


class LossModule(nn.Module):
    """The example's model with its loss; the same weights at every call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = MoELM(ModelConfig())

    def forward(self, windows: Tensor) -> Tensor:
        """Mean loss of ``(batch, time + 1)`` token ids, in nats."""
        return next_token_nll(self.model(windows[:, :-1]), windows[:, 1:]).mean()


@dataclass
class Training:
    """A variant at work on this process.

    Attributes:
        backward: Forward and backward, up to averaged gradients.
        module: Whose parameters hold what this process has of weights and gradients.
        optimizer: Of all of them.
    """

    backward: Callable[[], None]
    module: nn.Module
    optimizer: Optimizer

    def turn(self) -> None:
        """``STEPS_PER_TURN`` training steps, and a read of all weights: none can still be on its way."""
        for _ in range(STEPS_PER_TURN):
            self.optimizer.zero_grad()
            self.backward()
            self.optimizer.step()
        for weight in self.module.state_dict().values():
            local(weight).sum().item()

    def memory(self) -> dict[str, int]:
        """Bytes of weights, gradients and optimizer state that this process holds after a backward."""
        self.optimizer.zero_grad()
        self.backward()
        params = list(self.module.parameters())
        state = (value for state in self.optimizer.state.values() for value in state.values())
        return {
            "weights": _bytes(params),
            "gradients": _bytes(param.grad for param in params if param.grad is not None),
            "state": _bytes(value for value in state if isinstance(value, Tensor) and value.ndim),
        }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(local(tensor).nbytes for tensor in tensors)


def training(name: str, windows: Tensor) -> Training:
    """A variant of ``VARIANTS`` on this process' share of the windows, ``(batch, time + 1)`` token ids."""
    if name == "muon_fsdp":
        return _fully_sharded(windows)
    if name == "muon_zero1":
        return _sharded_optimizer(windows)
    module = LossModule()
    wrapped = DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(module.parameters()) if name == "AdamW, DDP" else lm.Muon(module)
    return Training(lambda: wrapped(windows).backward(), module, optimizer)


def _sharded_optimizer(windows: Tensor) -> Training:
    module = LossModule()
    zero1 = Zero1("muon_zero1")
    wrapped = DistributedDataParallel(module, **zero1.options.ddp_options({}))
    zero1.attach(wrapped)
    optimizer = lm.Muon(module)
    zero1.adopt([optimizer])

    def backward() -> None:
        loss = wrapped(windows)
        zero1.before_backward()
        loss.backward()
        zero1.after_backward()

    return Training(backward, module, optimizer)


def _fully_sharded(windows: Tensor) -> Training:
    module = LossModule()
    sharded = FullySharded("muon_fsdp", FSDPOptions())
    sharded.shard(module, cpu_mesh(), "32-true")
    optimizer = lm.Muon(module)
    sharded.adopt(module, [optimizer])
    return Training(lambda: module(windows).backward(), module, optimizer)


def _run(rank: int, processes: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    windows = torch.randint(0, 257, (GLOBAL_BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    variants = {name: training(name, windows.chunk(processes)[rank]) for name in VARIANTS}
    turns: dict[str, Callable[[], None]] = {name: one.turn for name, one in variants.items()}
    seconds = time_alternating(turns, rounds, before=dist.barrier)
    held: list[dict[str, dict[str, int]]] = [{}] * processes
    dist.all_gather_object(held, {name: one.memory() for name, one in variants.items()})
    if rank == 0:
        rows = {name: _row(seconds[name], [memory[name] for memory in held]) for name in VARIANTS}
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def _row(seconds_of_turns: Sequence[float], held: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    low, median, high = statistics.quantiles([1e3 * turn / STEPS_PER_TURN for turn in seconds_of_turns], n=4)
    most = max(held, key=lambda memory: sum(memory.values()))
    return {"median_ms": median, "quartiles_ms": [low, high], "bytes": dict(most)}


def measure(processes: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Time of a step, and the memory of the process that holds the most, by variant."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (processes, folder, rounds), nprocs=processes)  # type: ignore[attr-defined,no-untyped-call]
        rows: dict[str, dict[str, Any]] = json.loads(Path(folder, "rows.json").read_text())
    return rows


def markdown(figures: Mapping[str, Any]) -> str:
    """What was measured, and where: memory per process and time of a step, by variant, over the number of processes."""
    by_processes = figures["by_processes"]
    header = ["", *(f"{n} process{'es' if int(n) > 1 else ''}" for n in by_processes)]
    labels = {name: f"`{name}`" if name.startswith("muon_") else name for name in VARIANTS}
    rows = [[label, *(_cell(rows[name]) for rows in by_processes.values())] for name, label in labels.items()]
    where = (
        f"{figures['cpu_count']} cores of {figures['cpu']}, torch {figures['torch']}, commit"
        f" `{figures['commit'][:10]}`; {figures['tokens_of_all_processes']:,} tokens over all processes, medians of"
        f" {figures['rounds']} turns."
    )
    return f"{table(header, rows)}\n\n{where}"


def _cell(row: Mapping[str, Any]) -> str:
    return f"{sum(row['bytes'].values()) / _MIB:.1f} MiB, {row['median_ms']:.0f} ms"


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    figures = {
        "rounds": options.rounds,
        "tokens_of_all_processes": GLOBAL_BATCH * SEQ_LEN,
        "steps_per_turn": STEPS_PER_TURN,
        "by_processes": {str(processes): measure(processes, options.rounds) for processes in options.processes},
        **environment(),
    }
    print(markdown(figures))
    if options.json is not None:
        write(options.json, **figures)


if __name__ == "__main__":
    main()
