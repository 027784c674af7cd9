"""Several processes on one machine: a training step under ``muon_zero1`` and under plain DDP.

``python -m benchmarks.strategies [--processes 2] [--json benchmarks/results/strategies.json]``

The example's model and batch. The variants take turns within one process group: sharded Muon, Muon replicated on every
process (DDP), and ``torch.optim.AdamW`` under DDP. Each turn is a few steps and a read of all weights, so that a
gathering of weights that overlaps the next step is counted. Optimizer state is what each process really holds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import lightning_muon as lm
from benchmarks.timing import report, time_alternating
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM, next_token_nll
from lightning_muon.sharding.zero1 import Zero1

VARIANTS = ("AdamW, DDP", "Muon replicated, DDP", "muon_zero1")
STEPS_PER_TURN = 3


class _Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = MoELM(ModelConfig())

    def forward(self, windows: Tensor) -> Tensor:
        return next_token_nll(self.model(windows[:, :-1]), windows[:, 1:]).mean()


def variant(name: str, windows: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Callable[[], None], Optimizer]:
    """``STEPS_PER_TURN`` training steps on these windows, and the optimizer.

    Args:
        name: One of ``VARIANTS``.
        windows: ``(batch, time + 1)`` token ids, this process' share.
        group: The processes that train together; ``None`` is all.
    """
    module = _Loss()
    zero1 = Zero1(name, group=group) if name == "muon_zero1" else None
    ddp_options = zero1.options.ddp_options({}) if zero1 is not None else {}
    wrapped = DistributedDataParallel(module, process_group=group, **ddp_options)
    if name == "AdamW, DDP":
        optimizer: Optimizer = torch.optim.AdamW(module.parameters())
    else:
        optimizer = lm.Muon(module)
    if zero1 is not None:
        zero1.attach(wrapped)
        zero1.adopt([optimizer])

    def turn() -> None:
        for _ in range(STEPS_PER_TURN):
            optimizer.zero_grad()
            loss = wrapped(windows)
            if zero1 is not None:
                zero1.before_backward()
            loss.backward()
            if zero1 is not None:
                zero1.after_backward()
            optimizer.step()
        for weight in module.state_dict().values():
            weight.sum().item()

    return turn, optimizer


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of optimizer state that this process holds."""
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in tensors if isinstance(value, Tensor) and value.ndim)


def _run(rank: int, processes: int, store: str, rounds: int, path: Path | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    windows = torch.randint(0, 257, (16 // processes, 129), generator=torch.Generator().manual_seed(rank))
    variants = {name: variant(name, windows) for name in VARIANTS}
    turns = time_alternating({name: turn for name, (turn, _) in variants.items()}, rounds, before=dist.barrier)
    if rank == 0:
        seconds = {name: [turn / STEPS_PER_TURN for turn in values] for name, values in turns.items()}
        state = {name: state_bytes(optimizer) for name, (_, optimizer) in variants.items()}
        report(f"training step, {processes} processes", seconds, "AdamW, DDP", path, state_bytes_of_process_0=state)
        print("optimizer state of process 0: " + ", ".join(f"{n} {b / 2**20:.2f} MiB" for n, b in state.items()))
    dist.destroy_process_group()


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.processes, f"{folder}/store", options.rounds, options.json)
        mp.spawn(_run, arguments, nprocs=options.processes)  # type: ignore[attr-defined,no-untyped-call]


if __name__ == "__main__":
    main()
