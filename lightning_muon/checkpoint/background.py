"""Sharded saves while training goes on: it waits for copies to be taken, not for the disk."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from lightning_muon.checkpoint.folders import save_folder
from lightning_muon.checkpoint.tensors import flatten, nest
from lightning_muon.checkpoint.together import Processes

__all__ = ["BackgroundSaver", "PendingSave"]


class PendingSave:
    """A save that is under way.

    Attributes:
        path: The checkpoint.
    """

    def __init__(self, path: Path, executor: ThreadPoolExecutor, future: Future[None]) -> None:
        self.path = path
        self._executor = executor
        self._future = future

    def done(self) -> bool:
        """Whether this process has finished with it; the others may not have."""
        return self._future.done()

    def wait(self) -> None:
        """Return when the checkpoint is under its name.

        Raises:
            Exception: What ``save_folder`` raises, on every process. What was there before is intact.
        """
        try:
            self._future.result()
        finally:
            self._executor.shutdown()  # its thread has nothing left to do; leave none behind


class BackgroundSaver:
    """Saves sharded checkpoints one at a time, in a thread, on a process group of its own.

    Every process must construct it and call its methods in the same order. The copies are in CPU memory, pinned where
    there is a GPU; they are kept from save to save. An interpreter that ends by itself finishes the save first. One
    that is killed leaves what was there before.

    Args:
        timeout: How long the processes wait for each other; torch's default for ``None``.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        has_processes = dist.is_available() and dist.is_initialized()
        # collectives of two threads must not meet in one group, and this one's data is in CPU memory
        self._group = dist.new_group(backend="gloo", timeout=timeout) if has_processes else None
        self._processes = Processes.of(self._group)
        # not the DefaultStager around it, which torch 2.11 closes after the first save
        self._stager = StateDictStager(pin_memory=torch.cuda.is_available())
        self._pending: PendingSave | None = None

    def save(self, path: str | Path, state: Mapping[str, Any], meta: Mapping[str, Any]) -> PendingSave:
        """Copy ``state`` and ``meta``, which may change from then on, and start to save the copies.

        Waits for the last save first.

        Args:
            path: See ``save_folder``.
            state: See there.
            meta: See there.

        Raises:
            Exception: What the last save ended with, if nobody has waited for it.
        """
        self.wait()
        path = Path(path)
        staged: tuple[Any, Any] = ({}, {})
        error: Exception | None = None
        try:
            staged = self._copy(state, meta)
        except Exception as raised:  # told to the others in the thread: here they would not listen
            error = raised
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lightning_muon checkpoint")
        future = executor.submit(self._save, path, *staged, error)
        executor.shutdown(wait=False)  # the thread ends by itself, too
        self._pending = PendingSave(path, executor, future)
        return self._pending

    def wait(self) -> None:
        """Wait for the last save, if there is one; raises what it ended with, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()

    def close(self) -> None:
        """Wait for the last save, and give the process group and the copies back."""
        try:
            self.wait()
        finally:
            self._stager.close()  # type: ignore[no-untyped-call]
            if self._group is not None:
                dist.destroy_process_group(self._group)

    def _copy(self, state: Mapping[str, Any], meta: Mapping[str, Any]) -> tuple[Any, Any]:
        # detached: what a parameter carries beside its values is not for the disk
        bare = nest({where: tensor.detach() for where, tensor in flatten(state)})
        return self._stager.stage(bare), copy.deepcopy(dict(meta)) if self._processes.rank == 0 else {}

    def _save(self, path: Path, state: Any, meta: Any, error: Exception | None) -> None:
        def succeed() -> None:
            if error is not None:
                raise error

        self._processes.together(succeed)
        save_folder(path, state, meta, group=self._group)
