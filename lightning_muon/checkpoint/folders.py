"""A sharded checkpoint: a folder into which every process writes its part, and from which any number can read.

Its layout is what Lightning's ModelParallelStrategy writes: the files of ``torch.distributed.checkpoint`` for the
tensors, and ``meta.pt`` for the rest. ``manifest.json`` is ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from typing_extensions import override

from lightning_muon.checkpoint.atomic import begin, commit, discard, saving_path
from lightning_muon.checkpoint.errors import CheckpointError, some, unusable
from lightning_muon.checkpoint.files import file_system_error, load_file, unwritable, write
from lightning_muon.checkpoint.manifest import MANIFEST, checksums, read_manifest, verify_pieces, write_manifest
from lightning_muon.checkpoint.metadata import METADATA, SafeReader, read_metadata
from lightning_muon.checkpoint.tensors import check_tensors, flatten, nest
from lightning_muon.checkpoint.together import Processes

__all__ = ["META", "is_sharded", "load_folder", "load_whole", "read_meta", "read_shapes", "save_folder"]

META = "meta.pt"


def is_sharded(path: str | Path) -> bool:
    """Whether there is a folder that holds a sharded checkpoint, this library's or Lightning's."""
    path = Path(path)
    return (path / METADATA).is_file() and (path / META).is_file()


def save_folder(
    path: str | Path,
    state: Mapping[str, Any],
    meta: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Save what all processes hold together. Every one of them must call it.

    Args:
        path: The folder, the same on all processes, on a file system they share. What is there is replaced.
        state: Nested dictionaries of tensors, with the same keys everywhere. Of a DTensor every process writes its
            shard; of another tensor, which all have alike, one of them writes it.
        meta: The rest, small; process 0's is kept. Tensors, numbers, text, and lists and dictionaries of them.
        group: Who takes part; ``None`` is everybody.

    Raises:
        TypeError: ``state`` holds something else than tensors.
        OSError: It could not be written. What was there before is intact.
    """
    path, processes = Path(path), Processes.of(group)
    staged = saving_path(path)
    try:
        processes.together(lambda: check_tensors(state))
        processes.on_first(lambda: begin(path).mkdir())
        with _quiet(), _as_errors_of(path):
            save(dict(state), storage_writer=_Writer(staged), process_group=group)
        own = processes.together(lambda: {f.name: checksums(f) for f in staged.glob(f"__{processes.rank}_*.distcp")})
        processes.on_first(lambda: _complete(path, meta, {name: sums for part in own for name, sums in part.items()}))
    except BaseException as error:
        if processes.rank == 0:
            discard(path)
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise


def _complete(path: Path, meta: Mapping[str, Any], files: dict[str, Any]) -> None:
    staged = saving_path(path)
    strangers = [name for name in files if not (staged / name).is_file()]
    if strangers:
        raise OSError(
            f"Process 0 does not see {some(strangers)} in {staged}, which other processes have written: a sharded"
            " checkpoint needs a folder that all of them share"
        )
    write(dict(meta), staged / META)
    write_manifest(staged, {**files, **{name: checksums(staged / name) for name in (META, METADATA)}})
    commit(path)


def load_folder(
    path: str | Path,
    state: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
    verify: bool = True,
    weights_only: bool = True,
) -> dict[str, Any]:
    """Load a sharded checkpoint into tensors, in place; every process of ``group`` must call it.

    The processes may be other in number and hold other parts than those that saved. They share the verification, and
    nothing is changed on any of them unless all of them find everything right.

    Args:
        path: The folder.
        state: Nested dictionaries of the tensors to fill: all of the checkpoint, or some. DTensors get their shard.
        group: Who takes part; ``None`` is everybody, or this process alone without a process group.
        verify: Check every byte first. ``False`` also takes folders that Lightning's strategies have written.
        weights_only: ``False`` lets ``meta.pt`` run any code. Only for files that you wrote yourself.

    Returns:
        ``meta``.

    Raises:
        CheckpointError: It is missing, torn, altered, unsafe, lacks a tensor, or has one of another shape.
    """
    path, processes = Path(path), Processes.of(group)

    def look() -> tuple[Metadata, dict[str, Any]]:
        metadata, meta = _open(path, processes.rank, processes.size, verify, weights_only)
        _check_shapes(path, metadata, state)
        return metadata, meta

    opened: list[tuple[Metadata, dict[str, Any]]] = []
    processes.together(lambda: opened.append(look()))
    metadata, meta = opened[0]
    with _quiet(), _as_errors_of(path):
        load(dict(state), storage_reader=SafeReader(path, metadata), process_group=group)
    return meta


def load_whole(
    path: str | Path, *, verify: bool = True, weights_only: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load a sharded checkpoint into the memory of this one process, whatever saved it; no communication.

    Args:
        path: The folder.
        verify: See ``load_folder``.
        weights_only: See there.

    Returns:
        ``state``, with CPU tensors, and ``meta``.

    Raises:
        CheckpointError: It is missing, torn, altered, or unsafe.
    """
    path = Path(path)
    metadata, meta = _open(path, 0, 1, verify, weights_only)
    state = nest(
        {
            metadata.planner_data[key]: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in _tensors(path, metadata).items()
        }
    )
    with _quiet(), _as_errors_of(path):
        load(state, storage_reader=SafeReader(path, metadata), no_dist=True)
    return state, meta


def read_shapes(path: str | Path) -> dict[str, Any]:
    """The tensors of a sharded checkpoint as empty ones on the device ``meta``: names, shapes and dtypes, no bytes."""
    path = Path(path)
    metadata = read_metadata(path)
    return nest(
        {
            metadata.planner_data[key]: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for key, entry in _tensors(path, metadata).items()
        }
    )


def read_meta(path: str | Path, *, weights_only: bool = True) -> dict[str, Any]:
    """``meta`` of a sharded checkpoint, read for itself and not compared with the manifest."""
    meta: dict[str, Any] = load_file(Path(path) / META, weights_only=weights_only)
    return meta


def _open(path: Path, rank: int, world_size: int, verify: bool, weights_only: bool) -> tuple[Metadata, dict[str, Any]]:
    files = None
    if verify:
        manifest = read_manifest(path)
        verify_pieces(path, manifest, rank=rank, world_size=world_size)
        files = manifest["files"]
        if not {META, METADATA} <= set(files):
            raise unusable(path, f"Its {MANIFEST} does not name {META} and {METADATA}: it is altered.")
    metadata = read_metadata(path, files)
    return metadata, load_file(path / META, verify=False, weights_only=weights_only)


def _tensors(path: Path, metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    entries = metadata.state_dict_metadata
    pickled = [key for key, entry in entries.items() if not isinstance(entry, TensorStorageMetadata)]
    if pickled:
        raise unusable(
            path,
            f"Some of it is pickled and not tensors: {some(pickled)}. Loading that runs code.",
            "If you trust it, `python -m lightning.fabric.utilities.consolidate_checkpoint` makes one file of it.",
        )
    return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _check_shapes(path: Path, metadata: Metadata, state: Mapping[str, Any]) -> None:
    saved = {tuple(where): metadata.state_dict_metadata[key] for key, where in metadata.planner_data.items()}
    missing, other = [], []
    for where, tensor in flatten(state):
        entry, name = saved.get(where), ".".join(where)
        if not isinstance(entry, TensorStorageMetadata):
            missing.append(name)
        elif tuple(entry.size) != tuple(tensor.shape):
            other.append(f"{name} is {tuple(entry.size)} there and {tuple(tensor.shape)} here")
    faults = []
    if missing:
        faults.append(f"It lacks {some(missing)}.")
    if other:
        faults.append(f"Shapes differ: {some(other)}.")
    if faults:
        advice = "It is of another model; build the model as the saved run did. Nothing has been changed."
        raise unusable(path, " ".join(faults), advice)


class _Writer(FileSystemWriter):
    @override
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise file_system_error(error) from None

    @override
    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)  # without the hidden name the folder has while it is being written


@contextmanager
def _as_errors_of(path: Path) -> Iterator[None]:
    """torch wraps what went wrong on any process in a BaseException of its own."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = sorted(error.failures.items())[0]
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"{cause.strerror} (process {rank})", str(path)) from error
        raise CheckpointError(f"{path}: {type(cause).__name__} on process {rank}: {cause}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """One process without a process group is no mistake."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
