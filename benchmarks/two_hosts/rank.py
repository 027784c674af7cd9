"""One rank of the comparison: ``python -m benchmarks.two_hosts.rank '{"rank": 0, …}'``, started on its host."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]
from torch.distributed.tensor.debug import CommDebugMode

import lightning_muon as lm
from benchmarks.hosts import wire_bytes
from benchmarks.two_hosts.fsdp import SHARDED
from benchmarks.two_hosts.model import Transformer, batch
from benchmarks.two_hosts.peers import PEERS
from benchmarks.two_hosts.variants import VARIANTS, Task, Training

__all__ = ["Job"]

_TIMEOUT = timedelta(seconds=300)
_LEAD_S = 0.03  # how long the ranks may take to read that all are here
_WARMUP_STEPS = 4  # DDP rebuilds its buckets after the first; peers compile


@dataclass(frozen=True)
class Job:
    """What a rank is told.

    Attributes:
        rank, world_size: Which of how many.
        folder: Where all ranks meet, without using the wire, and leave their figures.
        variants: What to compare, in the order of every round.
        rounds: Blocks of every variant.
        steps: Steps of a block.
        tokens: Tokens of a rank's batch.
        dim: Features of the model.
        iteration: ``"float32"``, ``"bfloat16"`` or ``"own"``: see ``Task.iteration_dtype``.
    """

    rank: int
    world_size: int
    folder: str
    variants: list[str]
    rounds: int
    steps: int
    tokens: int
    dim: int
    iteration: str

    def figures(self) -> Path:
        """The file in which this rank leaves its figures."""
        return Path(self.folder) / f"rank{self.rank}.json"

    def argument(self) -> str:
        """The command line's argument."""
        return json.dumps(asdict(self))


class _Meeting:
    """Waits until all ranks are here, over a file: a barrier of the process group would be on the wire."""

    def __init__(self, job: Job) -> None:
        self.store = FileStore(f"{job.folder}/store", job.world_size)
        self._meetings = PrefixStore("meeting", self.store)
        self._job, self._number = job, 0

    def exchange(self, message: str = "") -> list[str]:
        """Everybody's message, by rank."""
        self._number += 1
        self._meetings.set(f"{self._number}/{self._job.rank}", message)
        keys = [f"{self._number}/{rank}" for rank in range(self._job.world_size)]
        return [self._meetings.get(key).decode() for key in keys]


def _prepare(job: Job, meeting: _Meeting) -> tuple[dict[str, Training], dict[str, str]]:
    """The variants that run, warmed up, and why the others do not; a failure is one only of a peer."""
    dtype = None if job.iteration == "own" else getattr(torch, job.iteration)
    task = Task(lambda: Transformer(job.dim), *batch(job.rank, job.tokens, job.dim), dtype)
    ours = {**VARIANTS, **SHARDED}
    trainings, left_out = {}, {}
    for name in job.variants:
        error = ""
        try:
            training = ours[name](task) if name in ours else PEERS[name][1](task)
            for _ in range(_WARMUP_STEPS):
                training.step()
        except Exception as failure:
            if name in ours:
                raise
            traceback.print_exc()
            error = f"{type(failure).__name__}: {failure}"
        errors = meeting.exchange(error)
        if any(errors):
            left_out[name] = next(filter(None, errors))
        else:
            trainings[name] = training
    return trainings, left_out


def _block(training: Training, steps: int, meeting: _Meeting) -> dict[str, Any]:
    """Some steps, and a read of the weights that they lead to: seconds and bytes of this rank, all of the block."""
    meeting.exchange()  # nothing else is on the wire
    sent, received = wire_bytes()
    meeting.exchange()  # nobody starts before all have read their counters
    start = time.perf_counter()
    for _ in range(steps):
        training.step()
    checksum = training.checksum()
    seconds = time.perf_counter() - start
    checksums = meeting.exchange(repr(checksum))  # everything has arrived
    if training.replicated and len(set(checksums)) > 1:
        raise RuntimeError(f"The ranks have different weights after a step; their sums by rank: {checksums}.")
    sent_by_now, received_by_now = wire_bytes()
    return {"seconds": seconds, "sent": sent_by_now - sent, "received": received_by_now - received}


def _updates(training: Training, steps: int, meeting: _Meeting) -> dict[str, Any]:
    """Optimizer steps by themselves, each with gradients of its own: seconds and bytes of this rank, all of them."""
    assert training.gradients is not None
    assert training.update is not None
    total = {"seconds": 0.0, "sent": 0, "received": 0}
    for _ in range(steps):
        training.gradients()
        meeting.exchange()
        sent, received = wire_bytes()
        # All clocks of one machine are the same clock: nobody is measured while it waits for who comes late.
        start = max(map(float, meeting.exchange(repr(time.perf_counter())))) + _LEAD_S
        time.sleep(max(0.0, start - time.perf_counter()))
        start = time.perf_counter()
        training.update()
        total["seconds"] += time.perf_counter() - start
        meeting.exchange()
        sent_by_now, received_by_now = wire_bytes()
        total["sent"] += sent_by_now - sent
        total["received"] += received_by_now - received
    return total


def _collectives(training: Training) -> dict[str, int]:
    """The collectives of one optimizer step by name, as torch dispatches them: DTensor's and everybody else's."""
    assert training.gradients is not None
    assert training.update is not None
    training.gradients()
    # Compiled code cannot be watched.
    with torch.compiler.set_stance("force_eager"), CommDebugMode() as counted:  # type: ignore[no-untyped-call]
        training.update()
    return {str(op): count for op, count in counted.get_comm_counts().items()}


def _orthogonalization_seconds(owned: list[Tensor], dtype: torch.dtype | None, meeting: _Meeting) -> float:
    """Time to orthogonalise these matrices, same shapes batched, while all ranks do theirs; nothing is sent."""
    by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for matrix in owned:
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
        by_shape[wide.shape].append(wide)
    stacks = [torch.stack(group) for group in by_shape.values()]
    meeting.exchange()
    start = time.perf_counter()
    for stack in stacks:
        lm.orthogonalize(stack, dtype=dtype)
    return time.perf_counter() - start


def _measure(job: Job, meeting: _Meeting) -> dict[str, Any]:
    trainings, left_out = _prepare(job, meeting)
    blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in trainings}
    updates: dict[str, list[dict[str, Any]]] = defaultdict(list)
    dtype = None if job.iteration == "own" else getattr(torch, job.iteration)
    owned = next((training.owned for training in trainings.values() if training.owned), [])
    orthogonalization = []
    for _ in range(job.rounds):
        for name, training in trainings.items():
            blocks[name].append(_block(training, job.steps, meeting))
            if training.update is not None:
                updates[name].append(_updates(training, job.steps, meeting))
        orthogonalization.append(_orthogonalization_seconds(owned, dtype, meeting))
    params = list(Transformer(job.dim).parameters())
    return {
        "blocks": blocks,
        "updates": updates,
        "collectives": {name: _collectives(trainings[name]) for name in updates},
        "left_out": left_out,
        "orthogonalization_seconds": orthogonalization,
        "owned_matrices": len(owned),
        "num_parameters": sum(param.numel() for param in params),
        "parameter_bytes": sum(param.nbytes for param in params),
        "num_matrices": sum(param.ndim == 2 for param in params),
    }


def main() -> None:
    """Measure and write the figures."""
    job = Job(**json.loads(sys.argv[1]))
    # One process per host, as a launcher would say it; some peers ask.
    os.environ.update(RANK=str(job.rank), WORLD_SIZE=str(job.world_size), LOCAL_RANK="0", LOCAL_SIZE="1")
    torch.set_num_threads(1)
    meeting = _Meeting(job)
    dist.init_process_group("gloo", store=meeting.store, rank=job.rank, world_size=job.world_size, timeout=_TIMEOUT)
    job.figures().write_text(json.dumps(_measure(job, meeting)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
