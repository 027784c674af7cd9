"""Run a function on several real processes that talk over gloo, and get back what each returned."""

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

_TIMEOUT = timedelta(seconds=120)  # a hang must fail the test, not the suite


def run_processes(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` processes of one process group.

    Args:
        world_size: Number of processes.
        function: A module-level function; its result is pickled with ``torch.save``.
        args: Its arguments.

    Returns:
        What each process returned, by rank.

    Raises:
        AssertionError: A process raised; the text holds every rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        processes = [
            context.Process(target=_main, args=(rank, world_size, folder, function, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
        assert not errors, "\n".join(errors)
        assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _main(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        # a file store needs no port that another test could hold
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=_TIMEOUT
        )
        torch.save(function(*args), Path(folder) / f"result-{rank}")
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None
