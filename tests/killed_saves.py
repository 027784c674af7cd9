"""Kill processes while they save, and report what is left: run by itself, for it forks, which wants few threads.

``python -m tests.killed_saves FOLDER`` prints JSON: for each kill what was killed, and what was found afterwards.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_muon.checkpoint import atomic
from lightning_muon.checkpoint.files import load_file, save_file
from lightning_muon.checkpoint.folders import is_sharded, load_whole, save_folder

NUM_RANDOM_KILLS = 22
# what changes the file system; another kill falls between any two of them
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "fsync", "exchange")


def save(path: Path, generation: int, folder: bool) -> None:
    state = {f"weight.{number}": torch.full((20_000,), float(generation)) for number in range(4)}
    if folder:
        save_folder(path, state, {"generation": generation})
    else:
        save_file({**state, "generation": generation}, path)


def load(path: Path) -> int:
    """The generation of the checkpoint, if all of it is of one."""
    if is_sharded(path):
        state, meta = load_whole(path)
    else:
        state = load_file(path)
        meta = {"generation": state.pop("generation")}
    assert len(state) == 4
    assert all(tensor.eq(meta["generation"]).all() for tensor in state.values())
    return int(meta["generation"])


def fork(function: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return child


def kill_at_random(path: Path, folder: bool, victim: int, generator: random.Random) -> dict[str, object]:
    """Save one generation after the other, a file by one process and a folder by two, until one is killed."""
    first, world_size = load(path) + 1, 2 if folder else 1
    reader, writer = os.pipe()

    def go_on_saving(rank: int) -> None:
        if folder:
            store = f"file://{path.parent}/store-{first}"
            dist.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=20)
            )
        for generation in range(first, first + 1000):
            save(path, generation, folder)
            if rank == 0:
                os.write(writer, struct.pack("i", generation))

    def report() -> int | None:
        reported = os.read(reader, 4)
        return struct.unpack("i", reported)[0] if reported else None

    children = [fork(partial(go_on_saving, rank)) for rank in range(world_size)]
    os.close(writer)
    report()
    start = time.perf_counter()
    done = report()
    time.sleep(generator.uniform(0, 2) * (time.perf_counter() - start))
    os.kill(children[victim], signal.SIGKILL)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    while (later := report()) is not None:
        done = later
    os.close(reader)
    survivors = [os.WEXITSTATUS(status) for rank, status in enumerate(statuses) if rank != victim]
    torn = atomic.saving_path(path).exists()
    return {"kind": "random", "allowed": [done, done + 1], "found": load(path), "torn": torn, "survivors": survivors}


def kill_at_event(path: Path, number: int, old: bool, new: bool) -> dict[str, object] | None:
    """Kill just before the ``number``-th change of the file system; ``None`` if there are not so many."""
    save(path, 1, old)

    def save_until_killed() -> None:
        events = 0

        def count(event: str, args: object) -> None:
            nonlocal events
            if event in EVENTS:
                events += 1
                if events == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        def counted(event: str, function: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object) -> object:
                sys.audit(event)
                return function(*args)

            return call

        os.fsync = counted("fsync", os.fsync)
        atomic._exchange = counted("exchange", atomic._exchange)
        sys.addaudithook(count)
        save(path, 2, new)

    _, status = os.waitpid(fork(save_until_killed), 0)
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0
        return None
    found = load(path)
    save(path, 3, new)
    assert load(path) == 3
    assert os.listdir(path.parent) == [path.name], "the next save clears up"
    return {"kind": f"{old}->{new}", "allowed": [1, 2], "found": found}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = []
    generator = random.Random(0)
    for is_folder in (False, True):
        path = folder / f"random {is_folder}" / "last.ckpt"
        save(path, 0, is_folder)
        for number in range(NUM_RANDOM_KILLS):
            victim = number % 2 if is_folder else 0
            results.append({**kill_at_random(path, is_folder, victim, generator), "folder": is_folder})
    for old in (False, True):
        for new in (False, True):
            number = 1
            path = folder / f"events {old} {new}" / "last.ckpt"
            while (result := kill_at_event(path, number, old, new)) is not None:
                results.append({**result, "folder": new, "event": number})
                number += 1
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
