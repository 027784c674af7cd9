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
from pathlib import Path

import torch

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
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return child


def kill_at_random(path: Path, folder: bool, generator: random.Random) -> dict[str, object]:
    """Save one generation after the other until killed."""
    first = load(path) + 1
    reader, writer = os.pipe()

    def go_on_saving() -> None:
        for generation in range(first, first + 1000):
            save(path, generation, folder)
            os.write(writer, struct.pack("i", generation))

    start = time.perf_counter()
    child = fork(go_on_saving)
    os.close(writer)
    done = struct.unpack("i", os.read(reader, 4))[0]
    time.sleep(generator.uniform(0, 2) * (time.perf_counter() - start))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while reported := os.read(reader, 4):
        done = struct.unpack("i", reported)[0]
    os.close(reader)
    torn = atomic.saving_path(path).exists()
    return {"kind": "random", "allowed": [done, done + 1], "found": load(path), "torn": torn}


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
        results += [
            {**kill_at_random(path, is_folder, generator), "folder": is_folder} for _ in range(NUM_RANDOM_KILLS)
        ]
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
