"""Run functions on several real processes that talk over gloo, and get back what each returned."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_COLLECTIVE_TIMEOUT = timedelta(seconds=60)  # a hang must fail the test, not the suite
_TASK_TIMEOUT_S = 150.0


class ProcessGroupPool:
    """A process group that waits for work: importing torch and lightning costs seconds, so tests share the processes.

    Args:
        world_size: Number of processes.
    """

    def __init__(self, world_size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._task = 0
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(world_size)]
        self._connections = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, world_size, self._folder.name, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """See :func:`run_processes`."""
        self._task += 1
        for connection in self._connections:
            connection.send((self._task, function, args))
        errors = []
        for rank, connection in enumerate(self._connections):
            try:
                error = connection.recv() if connection.poll(_TASK_TIMEOUT_S) else "no answer in time"
            except EOFError:
                error = "the process died"
            if error:
                errors.append(f"rank {rank}: {error}")
        if errors:
            raise AssertionError("\n".join(errors))
        paths = [Path(self._folder.name) / f"result-{self._task}-{rank}" for rank in range(len(self._processes))]
        return [torch.load(path, weights_only=False) for path in paths]

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()  # they hold nothing that has to be written
        for process in self._processes:
            process.join()
            process.close()
        self._folder.cleanup()


_pools: dict[int, ProcessGroupPool] = {}


def run_processes(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` processes of one process group.

    Args:
        world_size: Number of processes.
        function: A module-level function.
        args: Its arguments.

    Returns:
        What each process returned, by rank.

    Raises:
        AssertionError: A process raised; the text holds the tracebacks. The next call starts new processes.
    """
    if world_size not in _pools:
        _pools[world_size] = ProcessGroupPool(world_size)
    try:
        return _pools[world_size].run(function, *args)
    except BaseException:
        _pools.pop(world_size).close()
        raise


def close_pools() -> None:
    """End all processes that :func:`run_processes` has started."""
    while _pools:
        _pools.popitem()[1].close()


def _serve(rank: int, world_size: int, folder: str, connection: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    # a file store needs no port that another test could hold
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=_COLLECTIVE_TIMEOUT
    )
    while True:
        try:
            task, function, args = connection.recv()
        except EOFError:
            break
        try:
            torch.save(function(*args), Path(folder) / f"result-{task}-{rank}")
            connection.send(None)
        except BaseException:
            connection.send(traceback.format_exc())
    dist.destroy_process_group()
