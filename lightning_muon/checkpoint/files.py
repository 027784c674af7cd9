"""A full checkpoint: one file, whole or absent, verified before it is unpickled."""

from __future__ import annotations

import errno
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_muon.checkpoint.atomic import recover, replacing
from lightning_muon.checkpoint.errors import CheckpointError, unusable
from lightning_muon.checkpoint.together import Processes

__all__ = ["file_system_error", "load_file", "load_file_together", "save_file", "unwritable", "verify_file", "write"]

_READ_BYTES = 1 << 20
# what zipfile lets through when bytes of a directory or a header are wrong
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OSError,
)


def save_file(checkpoint: Any, path: str | Path) -> None:
    """``torch.save`` that leaves the old file or the new one, whole, whenever the process is killed.

    Args:
        checkpoint: What ``load_file`` can read: tensors, numbers, text, and lists and dictionaries of them.
        path: The file. What is there is replaced.

    Raises:
        OSError: It could not be written, for want of space say. What was there before is intact.
    """
    path = Path(path)
    try:
        with replacing(path) as staged:
            write(checkpoint, staged)
    except OSError as error:
        raise unwritable(path, error) from error


def write(checkpoint: Any, path: Path) -> None:
    """``torch.save``, with checksums, and with the file system's own error where that refuses."""
    try:
        with _checksums_on(), open(path, "wb") as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:
        raise file_system_error(error) from None


def file_system_error(error: BaseException) -> BaseException:
    """Why a write failed: torch's writer goes on after an ``OSError``, and then complains of a wrong position."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or error


def unwritable(path: Path, error: OSError) -> OSError:
    """The error of a save that the file system did not take."""
    try:
        free = f"{shutil.disk_usage(path.parent).free / 2**20:,.0f} MiB are free there"
    except OSError:
        free = f"there is no folder {path.parent}"
    return OSError(
        error.errno or errno.EIO,
        f"The checkpoint could not be written ({error.strerror or error}; {free}). What was saved under this name"
        " before is intact. Make room, or save elsewhere",
        str(path),
    )


def load_file(path: str | Path, *, verify: bool = True, weights_only: bool = True) -> Any:
    """Read a checkpoint into CPU memory, page by page as it is needed, without running anything that it holds.

    Args:
        path: A file that ``torch.save`` wrote: by ``save_file``, by Trainer or Fabric.
        verify: Check every byte first; see ``verify_file``.
        weights_only: ``False`` lets the file run any code. Only for files that you wrote yourself.

    Raises:
        CheckpointError: It is missing, torn, altered, no checkpoint, or would need to run code.
    """
    path = Path(path)
    if verify:
        verify_file(path)
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        unsafe = _unsafe_names(path)
        if not unsafe:
            raise unusable(path, f"It cannot be unpickled: {_first_line(error)}.") from error
        raise unusable(
            path,
            f"It holds more than tensors and plain values: {', '.join(unsafe)}. Loading those runs code.",
            "If you trust the file, name the classes to torch.serialization.add_safe_globals([...]) first, or load"
            " with weights_only=False.",
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # whatever torch says of bytes that are no checkpoint
        raise unusable(path, f"It cannot be read: {_first_line(error)}.") from error


def load_file_together(path: str | Path, *, group: dist.ProcessGroup | None = None, weights_only: bool = True) -> Any:
    """``load_file`` by all processes at once: they share the verification, and all raise if one finds a fault.

    Args:
        path: A file that all of them see.
        group: Who takes part; ``None`` is everybody, or this process alone without a process group.
        weights_only: See ``load_file``.

    Raises:
        CheckpointError: See there.
    """
    path, processes = Path(path), Processes.of(group)
    loaded: list[Any] = []

    def verify_and_load() -> None:
        verify_file(path, rank=processes.rank, world_size=processes.size)
        loaded.append(load_file(path, verify=False, weights_only=weights_only))

    processes.together(verify_and_load)
    return loaded[0]


def verify_file(path: str | Path, *, rank: int = 0, world_size: int = 1) -> None:
    """Check that a checkpoint is complete and as it was written.

    torch's files are zip archives with a CRC-32 of every tensor, which ``torch.load`` does not look at.

    Args:
        path: The file.
        rank: Which share of the file to check.
        world_size: Into how many shares: every process can read one, and they agree on the verdict.

    Raises:
        CheckpointError: It is missing, torn, altered, or no checkpoint.
    """
    path = Path(path)
    recover(path)
    if path.is_dir():
        raise unusable(path, "It is a folder, not a file.", "Folders are read by lightning_muon.checkpoint.folders.")
    if not path.is_file():
        raise unusable(path, "There is no such checkpoint.")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if not any(entry.filename.endswith("/data.pkl") for entry in entries):
                raise unusable(path, "It is a zip archive, but not one that torch.save wrote.")
            # entries of like sizes are adjacent, for they are one model's layers
            for entry in entries[rank::world_size]:
                _read_through(archive, entry)
    except CheckpointError:
        raise
    except _ZIP_ERRORS as error:
        size = path.stat().st_size
        what = f"It is cut off, altered, or no checkpoint ({size:,} bytes; {_first_line(error)})."
        raise unusable(path, what) from error


def _read_through(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    with archive.open(entry) as file:
        while file.read(_READ_BYTES):  # raises at the end if the CRC-32 is another
            pass


@contextmanager
def _checksums_on() -> Iterator[None]:
    """Somebody may have switched them off for speed; a file without them could not be verified."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _unsafe_names(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the pickle itself is broken
        return []


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
