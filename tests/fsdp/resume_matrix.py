"""Who can go on from whose checkpoint: every layout from every other, and how far the next five steps are off.

``python -m tests.fsdp.resume_matrix`` prints the table of docs/resume.md.
"""

from __future__ import annotations

import platform
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch

import lightning_muon as lm
from tests.lightning_runs import AwkwardLightningModule, PoolEnvironment, trainer, weights
from tests.processes import close_pools, run_processes

SAVED_AT, STEPS = 5, 10
BLOCKS = (torch.nn.Linear, torch.nn.Conv1d)


@dataclass(frozen=True)
class Layout:
    """A strategy on a number of processes."""

    name: str
    world_size: int
    strategy: str = "muon_fsdp"
    replicas: int = 1
    folder: bool = False


LAYOUTS = [
    Layout("1 device", 1, "auto"),
    Layout("DDP, 2", 2, "ddp"),
    Layout("zero1, 2", 2, "muon_zero1"),
    Layout("zero1, 3", 3, "muon_zero1"),
    Layout("fsdp, 2", 2),
    Layout("fsdp, 4", 4),
    Layout("hsdp, 2×2", 4, replicas=2),
]
FOLDERS = [
    Layout("fsdp, 2, folder", 2, folder=True),
    Layout("fsdp, 4, folder", 4, folder=True),
    Layout("hsdp, 2×2, folder", 4, replicas=2, folder=True),
]
SOURCES = [*LAYOUTS, *FOLDERS]


def _strategy(layout):
    if layout.strategy != "muon_fsdp":
        return layout.strategy
    return lm.MuonFSDPStrategy(
        wrap=BLOCKS, num_replicas=layout.replicas, save_distributed_checkpoint=layout.folder, exchange_mb=0.002
    )


def _run(layout, resume_from, save_to):
    module = AwkwardLightningModule(num_steps=STEPS)
    options = {}
    if layout.strategy in ("auto", "ddp"):  # Lightning's own; the plugin reads folders, too
        options["plugins"] = [PoolEnvironment(), lm.MuonCheckpointIO()]
    last = SAVED_AT if save_to else STEPS
    run = trainer(last, strategy=_strategy(layout), **options)
    run.fit(module, ckpt_path=resume_from)
    assert run.global_step == last
    if save_to:
        run.save_checkpoint(save_to)
        return None
    return weights(module)


def run(layout, resume_from=None, save_to=None):
    """Train on the layout's processes: from the start or from a checkpoint, to the end or to the save."""
    return run_processes(layout.world_size, _run, layout, resume_from, save_to)[0]


def distance(actual, expected):
    """The largest relative difference of a weight; 0 for equal bits."""
    if all(torch.equal(actual[name], weight) for name, weight in expected.items()):
        return 0.0
    return max(((actual[name] - w).norm() / w.norm()).item() for name, w in expected.items())


class Matrix:
    """Runs what is asked for, each once.

    Args:
        folder: Where checkpoints go.
    """

    def __init__(self, folder):
        self._folder = Path(folder)
        self._uninterrupted = {}

    def checkpoint(self, source):
        path = self._folder / f"{source.name}.ckpt"
        if not path.exists():
            run(source, save_to=str(path))
        assert path.is_dir() == source.folder
        return str(path)

    def uninterrupted(self, source):
        key = (source.strategy, source.world_size, source.replicas)
        if key not in self._uninterrupted:
            self._uninterrupted[key] = run(source)
        return self._uninterrupted[key]

    def cell(self, source, target):
        """How far five steps of ``target`` from the checkpoint of ``source`` are from ``source`` going on."""
        resumed = run(target, resume_from=self.checkpoint(source))
        return distance(resumed, self.uninterrupted(source))


def is_same(source, target):
    """Whether the run goes on as it was."""
    return (source.strategy, source.world_size, source.replicas) == (
        target.strategy,
        target.world_size,
        target.replicas,
    )


def table(cells):
    """Markdown: a row for each source, a column for each target."""
    head = "| saved by ↓, resumed by → | " + " | ".join(target.name for target in LAYOUTS) + " |"
    lines = [head, "|---" * (len(LAYOUTS) + 1) + "|"]
    for source in SOURCES:
        row = [cells[source.name, target.name] for target in LAYOUTS]
        lines.append(f"| {source.name} | " + " | ".join("bitwise" if c == 0 else f"{c:.0e}" for c in row) + " |")
    return "\n".join(lines)


def main():
    """Print the table, with what it was made on."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(folder)
        cells = {(s.name, t.name): matrix.cell(s, t) for s in SOURCES for t in LAYOUTS}
    close_pools()
    print(table(cells))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"\ntorch {torch.__version__}, Lightning {L.__version__}, {platform.machine()}, gloo; commit {commit}.")


if __name__ == "__main__":
    main()
