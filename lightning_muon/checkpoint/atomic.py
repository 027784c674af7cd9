"""A checkpoint under a name is the old one or the new one, whole, at whatever moment a process is killed.

It is written under a hidden sibling name, brought to the disk, and then swapped in by one system call. Lightning's
``ckpt_path="last"`` takes the newest ``last*.ckpt``: ``.last.ckpt.saving`` is none, so a torn one is never picked.

One process does all of it with ``replacing``. Where several write into one folder, one of them calls ``begin`` before
the others start and ``commit`` when they have finished; they write into ``saving_path``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["begin", "commit", "discard", "recover", "remove", "replacing", "saving_path"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_OF_A_CHECKPOINT = (".metadata", "meta.pt", "manifest.json")
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def saving_path(path: Path) -> Path:
    """Where a checkpoint is while it is being written."""
    return path.with_name(f".{path.name}.saving")


def _replaced_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file or a folder at the path this yields; it takes the name ``path`` when the block ends without error.

    Args:
        path: The checkpoint. A file or a folder of that name is replaced.
    """
    staged = begin(path)
    try:
        yield staged
        commit(path)
    except BaseException:
        discard(path)
        raise


def begin(path: Path) -> Path:
    """Remove what a killed save of the same name has left, and make the folder that ``path`` is in.

    Returns:
        ``saving_path(path)``, where there is nothing now.

    Raises:
        IsADirectoryError: A folder that is no checkpoint has the name; it would be lost.
    """
    recover(path)
    _require_replaceable(path)
    discard(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return saving_path(path)


def _require_replaceable(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()) and not any((path / name).is_file() for name in _OF_A_CHECKPOINT):
        raise IsADirectoryError(
            errno.EISDIR, "There is a folder of this name, and it is no checkpoint: choose another name", str(path)
        )


def commit(path: Path) -> None:
    """Give what is at ``saving_path(path)`` the name ``path``, once it is on the disk, and remove what it replaces."""
    staged = saving_path(path)
    _sync(staged)
    _swap(staged, path)
    _sync_folder(path.parent)
    _remove(staged)
    _remove(_replaced_path(path))


def discard(path: Path) -> None:
    """Give up a save: what is at ``path`` stays."""
    _remove(saving_path(path))


def remove(path: Path) -> None:
    """Remove a checkpoint: its name first, so that a killed process leaves no half of a folder under it."""
    discard(path)
    with suppress(FileNotFoundError):
        os.rename(path, saving_path(path))
    discard(path)


def recover(path: Path) -> None:
    """Undo half a replacement by two renames (see ``_swap``), the work of a process that was killed between them."""
    replaced = _replaced_path(path)
    if os.path.lexists(replaced):
        with suppress(FileNotFoundError):  # another process does the same
            if os.path.lexists(path):
                _remove(replaced)
            else:
                os.rename(replaced, path)


def _swap(staged: Path, path: Path) -> None:
    """rename(2) replaces a file by a file, and nothing by anything. It replaces no folder that has entries, and no
    file by a folder: those two change names with each other, in one call where Linux and the file system can (ext4,
    xfs, btrfs, tmpfs). Where they cannot (NFS, other systems) it takes two renames; a process killed between them
    leaves nothing under the name, but both checkpoints whole beside it, and ``recover`` brings the old one back."""
    is_folder = staged.is_dir() or (path.is_dir() and not path.is_symlink())
    if not (is_folder and os.path.lexists(path)):
        os.replace(staged, path)
    elif not _exchange(staged, path):
        os.rename(path, _replaced_path(path))
        os.rename(staged, path)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change names atomically; ``False`` if that cannot be had here."""
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@cache
def _renameat2() -> Any:
    """glibc has had it since 2.28; musl and other systems have not."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return function


def _sync(path: Path) -> None:
    """A rename may reach the disk before the bytes it names: those first."""
    if path.is_dir():
        for entry in path.iterdir():
            _sync(entry)
        _sync_folder(path)
    else:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
