"""Kill one process of a training job around its saves, resume, kill again: run by itself, for it forks.

``python -m tests.killed_jobs FOLDER [KILLS_OF_EACH_VARIANT]`` prints JSON: what each kill left behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_muon as lm
from lightning_muon.checkpoint.canonical import load_canonical
from tests.lightning_runs import AwkwardLightningModule, trainer, weights

SAVE_EVERY, WORLD_SIZE, TIMEOUT_S = 2, 2, 20
KILLS_OF_EACH = 5
MAX_SAVES = 4  # of one job before it is killed; it makes two at a time
NEVER_ENDED = "never ended"
IN_BACKGROUND = "muon_fsdp, folder in the background"
FSDP = partial(lm.MuonFSDPStrategy, wrap=(torch.nn.Linear,))
VARIANTS: dict[str, Callable[[], Any]] = {
    "muon_zero1, file": lm.MuonZero1Strategy,
    "muon_fsdp, file": FSDP,
    "muon_fsdp, folder": partial(FSDP, save_distributed_checkpoint=True),
    IN_BACKGROUND: partial(FSDP, save_distributed_checkpoint=True, save_in_background=True),
}


class Module(AwkwardLightningModule):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass  # the checkpoints are compared


def train(strategy: Any, folder: Path, steps: int, keep: int, report: Callable[[str], None]) -> None:
    """A user's job, and what it says: which saves have begun and returned."""
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVE_EVERY, save_top_k=keep, save_last=True)
    job = trainer(steps, strategy, enable_checkpointing=True, callbacks=[saving])
    save = job.save_checkpoint

    def reporting(path: str, *args: Any, **kwargs: Any) -> None:
        report(f"begins {job.global_step} {Path(path).name}")
        save(path, *args, **kwargs)
        report(f"returned {job.global_step} {Path(path).name}")

    job.save_checkpoint = reporting
    module = Module(steps)
    job.fit(module, ckpt_path="last")
    whole = weights(module)
    if dist.get_rank() == 0:
        torch.save(whole, folder / "weights.pt")


class Job:
    """``WORLD_SIZE`` forks of this process that train together, and what rank 0 reports."""

    def __init__(self, variant: str, folder: Path, steps: int, keep: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        reader, writer = os.pipe()
        self.errors = [folder.parent / f"{folder.name}-errors-{rank}" for rank in range(WORLD_SIZE)]
        store = folder.parent / f"store-{time.monotonic_ns()}"
        self.children = []
        for rank in range(WORLD_SIZE):
            child = os.fork()
            if child == 0:
                os.close(reader)
                sys.stderr = self.errors[rank].open("w")
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{store}",
                    rank=rank,
                    world_size=WORLD_SIZE,
                    timeout=timedelta(seconds=TIMEOUT_S),
                )

                def report(text: str, rank: int = rank) -> None:
                    if rank == 0:
                        os.write(writer, f"{text}\n".encode())

                train(VARIANTS[variant](), folder, steps, keep, report)
                sys.exit(0)  # as a script ends
            self.children.append(child)
        os.close(writer)
        self._reports = os.fdopen(reader)
        self.reported: list[list[str]] = []

    def wait_for_report(self) -> list[str] | None:
        line = self._reports.readline()
        if not line:
            return None
        self.reported.append(line.split())
        return self.reported[-1]

    def end(self) -> list[int | str]:
        """Exit codes, negative for signals. A process that does not end in time is killed."""
        deadline = time.monotonic() + 2 * TIMEOUT_S
        codes: dict[int, int | str] = {}
        while len(codes) < WORLD_SIZE and time.monotonic() < deadline:
            for child in set(self.children) - set(codes):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[child] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        for child in set(self.children) - set(codes):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            codes[child] = NEVER_ENDED
        while self.wait_for_report():
            pass
        self._reports.close()
        return [codes[child] for child in self.children]


def digest(path: Path) -> tuple[int, str]:
    """Step and contents of a checkpoint: weights and the optimizer's state, to the bit."""
    checkpoint = load_canonical(path)
    state = [sorted(checkpoint["state_dict"].items()), checkpoint["optimizer_states"]]
    values = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            add((str(value.dtype), tuple(value.shape)))
            values.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        elif isinstance(value, dict):
            add(sorted(value.items(), key=lambda item: str(item[0])))
        elif isinstance(value, (list, tuple)):
            for part in value:
                add(part)
        else:
            values.update(repr(value).encode())

    add(state)
    return checkpoint["global_step"], values.hexdigest()


def uninterrupted(variant: str, folder: Path, steps: int) -> dict[int, str]:
    """What was saved at each step by a job that nobody killed; it keeps everything."""
    job = Job(variant, folder, steps, keep=-1)
    codes = job.end()
    assert codes == [0] * WORLD_SIZE, "\n".join(path.read_text() for path in job.errors)
    return dict(digest(path) for path in folder.glob("step=*.ckpt"))


def last(folder: Path) -> tuple[int, str]:
    path = folder / "last.ckpt"
    return digest(path) if path.exists() else (0, "")


def completed(reported: list[list[str]], in_background: bool) -> int:
    """The step of the last ``last.ckpt`` that is on the disk for certain."""
    saves = [report for report in reported if report[0] == "returned"]
    if in_background:
        saves = saves[:-1]  # a save waits for the one before
    return max((int(step) for _, step, name in saves if name == "last.ckpt"), default=0)


def kill(
    variant: str, folder: Path, steps: int, victim: int, generator: random.Random, save_s: float
) -> dict[str, Any]:
    """Resume the job from what is there, and kill a process at some time after one of its saves has begun."""
    resumed_at, _ = last(folder)
    job = Job(variant, folder, steps)
    for _ in range(generator.randint(1, MAX_SAVES)):
        while (report := job.wait_for_report()) and report[0] != "begins":
            pass
    time.sleep(generator.uniform(0, save_s))
    os.kill(job.children[victim], signal.SIGKILL)
    codes = job.end()
    torn = sorted(path.name for path in folder.glob(".*"))
    begun = [int(step) for what, step, _ in job.reported if what == "begins"]
    return {
        "victim": victim,
        "codes": codes,
        "survivor_said": job.errors[1 - victim].read_text()[-2000:],
        "torn": torn,
        "in_save": bool(torn) or 2 * len(begun) > len(job.reported),
        "resumed_at": resumed_at,
        "first_save": min(begun, default=None),
        "allowed": [max(resumed_at, completed(job.reported, variant == IN_BACKGROUND)), max(begun, default=resumed_at)],
        "last": last(folder),
        "others": [digest(path) for path in folder.glob("step=*.ckpt")],
    }


def time_of_a_save_s(folder: Path) -> float:
    """At most: from one to the next, of the two that are made at a time."""
    times = sorted(path.stat().st_mtime for path in folder.glob("step=*.ckpt"))
    return (times[-1] - times[0]) / (len(times) - 1) / 2


def main(folder: Path, num_kills: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    steps = SAVE_EVERY * (num_kills * MAX_SAVES // 2 + 1)
    generator = random.Random(0)
    references: dict[str, dict[int, str]] = {}
    results = {}
    for variant in VARIANTS:
        strategy = variant.partition(",")[0]
        whole, killed = folder / strategy, folder / variant
        if strategy not in references:
            references[strategy] = uninterrupted(variant, whole, steps)
        save_s = time_of_a_save_s(whole)
        kills = [kill(variant, killed, steps, number % 2, generator, save_s) for number in range(num_kills)]
        job = Job(variant, killed, steps)
        codes = job.end()
        weights_of = [torch.load(path / "weights.pt") for path in (whole, killed)]
        results[variant] = {
            "saved_without_kills": references[strategy],
            "kills": kills,
            "codes": codes,
            "errors": [path.read_text()[-2000:] for path in job.errors],
            "equal": all(torch.equal(weight, weights_of[1][name]) for name, weight in weights_of[0].items()),
            "left": sorted(path.name for path in killed.iterdir()),
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else KILLS_OF_EACH)
