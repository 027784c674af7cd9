"""Memory per rank of a model that is trained by ``muon_zero1`` and by ``muon_fsdp`` on 1, 2 and 4 processes.

``python -m benchmarks.fsdp_memory [--json benchmarks/results/fsdp_memory.json]``

Weights, gradients and optimizer state are the bytes of this rank's tensors. The peaks of a step's two halves are of
the memory of all tensors that torch's operations have made since before the model, and that live. A process's resident
memory would depend on when pages are touched and given back, and on what libraries keep; this depends on timing only
as far as messages do, which may arrive before or after the next one leaves. Workspaces inside a kernel and gloo's own
buffers are not in it. The units are the transformer's layers; inputs are small, so that activations do not hide the
rest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_muon as lm
from benchmarks.two_hosts.fsdp import cpu_mesh, train_sharded
from benchmarks.two_hosts.model import SEQ_LEN, Transformer, batch
from benchmarks.two_hosts.variants import LR, Task, Training, train_under_ddp
from examples.moe_lm.environment import environment
from lightning_muon.local import local
from lightning_muon.sharding.fsdp import FSDPOptions
from lightning_muon.sharding.fsdp.fully_sharded import FullySharded
from lightning_muon.sharding.zero1 import Zero1

__all__ = ["Held", "measure"]

_MIB = 2**20
_WARMUP_STEPS = 2  # DDP rebuilds its buckets after the first


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up, at every operation, the memory of all tensors that operations have seen and that still live.

    Storages are looked at anew each time: FSDP2 gives memory back by making them smaller, and futures drop tensors in
    gloo's threads.

    Attributes:
        peaks: For each phase, the most that was held, in bytes.
        phase: The name of what is going on; without one nothing is measured.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = ""
        self.peaks: dict[str, int] = {}
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, on the shards
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, results)):
            if isinstance(tensor, Tensor):
                self._storages.add(tensor.untyped_storage())
        if self.phase:
            held = sum(storage.nbytes() for storage in self._storages)
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), held)
        return results


def _zero1(task: Task) -> tuple[Training, lm.Muon]:
    optimizers: list[lm.Muon] = []

    def make(module: torch.nn.Module) -> list[lm.Muon]:
        optimizers.append(lm.Muon(module, lr=LR, orthogonalization_dtype=task.iteration_dtype))
        return optimizers

    return train_under_ddp(task, make, Zero1("muon_zero1")), optimizers[0]


def _fsdp(task: Task) -> tuple[Training, lm.Muon]:
    module = task.make_model()
    sharded = FullySharded("muon_fsdp", FSDPOptions())
    sharded.shard(module, cpu_mesh(), "32-true")
    optimizer = lm.Muon(module, lr=LR, orthogonalization_dtype=task.iteration_dtype)
    sharded.adopt(module, [optimizer])
    return train_sharded(task, module, [optimizer]), optimizer


_STRATEGIES = {"muon_zero1": _zero1, "muon_fsdp": _fsdp}


def measure(strategy: str, dim: int, depth: int) -> dict[str, int]:
    """This rank's memory, in bytes; called on all ranks.

    Returns:
        ``weights``, ``gradients``, ``state``: of this rank's tensors after a backward. ``backward``, ``update``: the
        most that the rank holds in either half of a step, all of it. ``whole``: weights of the whole model; ``unit``:
        of its largest unit.
    """
    found: dict[str, int] = {}

    def train(held: Held) -> None:
        task = Task(lambda: Transformer(dim, depth), *batch(dist.get_rank(), SEQ_LEN, dim), torch.float32)
        training, optimizer = _STRATEGIES[strategy](task)
        for _ in range(_WARMUP_STEPS):
            training.step()
        optimizer.zero_grad()
        optimizer.synchronize()
        params = [param for _, param in optimizer.named_parameters()]

        def before_update(*_: object) -> None:
            found["gradients"] = _bytes([param.grad for param in params if param.grad is not None])
            held.phase = "update"

        optimizer.register_step_pre_hook(before_update)
        held.phase = "backward"
        training.step()
        optimizer.synchronize()
        found.update(weights=_bytes(params), state=optimizer.local_state_bytes())

    with Held() as held:
        train(held)
    found |= held.peaks
    model = Transformer(dim, depth)
    return {
        **found,
        "whole": _bytes(list(model.parameters())),
        "unit": max(_bytes(list(layer.parameters())) for layer in model.layers),
    }


def _bytes(tensors: list[Any]) -> int:
    parts: list[Tensor] = [local(tensor) for tensor in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def _rank(rank: int, world_size: int, folder: str, dim: int, depth: int) -> None:
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    figures = {strategy: measure(strategy, dim, depth) for strategy in _STRATEGIES}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dim", type=int, default=512, help="features of the transformer")
    parser.add_argument("--depth", type=int, default=8, help="its layers")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    print("MiB of the rank with the most")
    columns = ("weights", "gradients", "state", "together", "backward", "update")
    print(f"{'':12}{'ranks':>6}" + "".join(f"{column:>11}" for column in columns))
    results: dict[str, dict[int, dict[str, Any]]] = {strategy: {} for strategy in _STRATEGIES}
    for world_size in options.world_sizes:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (world_size, folder, options.dim, options.depth)
            mp.spawn(_rank, arguments, nprocs=world_size)  # type: ignore[attr-defined, no-untyped-call]
            ranks = [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(world_size)]
        for strategy, by_world_size in results.items():
            own = [rank[strategy] for rank in ranks]
            row = {key: max(figures[key] for figures in own) for key in own[0]}
            row["together"] = max(figures["weights"] + figures["gradients"] + figures["state"] for figures in own)
            by_world_size[world_size] = {**row, "by_rank": own}
            cells = "".join(f"{row[column] / _MIB:>11.2f}" for column in columns)
            print(f"{strategy:12}{world_size:>6}{cells}", flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {"dim": options.dim, "depth": options.depth, "tokens_per_rank": SEQ_LEN}
        options.json.write_text(json.dumps({**settings, "strategies": results, **environment()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
