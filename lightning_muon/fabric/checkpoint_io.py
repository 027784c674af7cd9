"""Lightning's plugin for checkpoints on disk: whole or absent, verified, from one file or from a sharded folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from typing_extensions import override

from lightning_muon.checkpoint.atomic import recover, remove
from lightning_muon.checkpoint.canonical import load_canonical
from lightning_muon.checkpoint.errors import CheckpointError
from lightning_muon.checkpoint.files import load_file_together, save_file
from lightning_muon.checkpoint.together import Processes

__all__ = ["MuonCheckpointIO", "WholeCheckpoints", "is_folder", "read_together", "require_local"]


class MuonCheckpointIO(TorchCheckpointIO):
    """Reads and writes the one checkpoint that all strategies share.

    A save replaces a file in one step; a file is verified byte by byte before it is unpickled, without running code;
    and the folders of ``muon_fsdp`` can be read, too. ``muon_zero1`` and ``muon_fsdp`` use it; for others there is
    ``Trainer(plugins=[lm.MuonCheckpointIO()])``. Paths with a protocol, such as ``s3://``, go Lightning's own way.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        if _is_remote(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            save_file(checkpoint, Path(path))

    @override
    def load_checkpoint(
        self, path: _PATH, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """See Lightning's.

        Args:
            path: A file, or a folder that ``muon_fsdp`` has written.
            map_location: For paths with a protocol; otherwise the result is in CPU memory.
            weights_only: ``False`` lets the checkpoint run any code. Only for those that you wrote yourself.

        Raises:
            CheckpointError: It is missing, torn, altered, or unsafe.
        """
        if _is_remote(path):
            return super().load_checkpoint(path, map_location, **_asked(weights_only))
        return load_canonical(Path(path), weights_only=weights_only is not False)

    @override
    def remove_checkpoint(self, path: _PATH) -> None:
        if _is_remote(path):
            super().remove_checkpoint(path)
        else:
            remove(Path(path))


class WholeCheckpoints:
    """A strategy whose checkpoints are ``MuonCheckpointIO``'s unless the user has chosen a plugin."""

    _checkpoint_io: CheckpointIO | None

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """The plugin."""
        chosen: Any = self._checkpoint_io
        if chosen is None:
            self._checkpoint_io = chosen = MuonCheckpointIO()
        elif hasattr(chosen, "checkpoint_io"):  # such as AsyncCheckpointIO, which writes through another
            chosen.checkpoint_io = MuonCheckpointIO()
        io: CheckpointIO = chosen
        return io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's own; where process 0 cannot write, all processes raise, and none waits for it."""
        save = cast(Any, super()).save_checkpoint
        Processes.of(None).together(lambda: save(*args, **kwargs))

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Lightning's own; where one process cannot read, all raise."""
        load = cast(Any, super()).load_checkpoint
        found: list[dict[str, Any]] = []
        Processes.of(None).together(lambda: found.append(load(*args, **kwargs)))
        return found[0]


def _is_remote(path: _PATH) -> bool:
    """Whether a path has a protocol, such as ``s3://``."""
    return "://" in str(path)


def require_local(path: _PATH, strategy: str) -> None:
    """Raise for a path with a protocol.

    Raises:
        ValueError: It has one.
    """
    if _is_remote(path):
        raise ValueError(
            f"{strategy} writes and reads shards on a file system that all processes share, and {path} is elsewhere."
            " Give a path of the file system, or save one file (save_distributed_checkpoint=False)."
        )


def is_folder(path: _PATH) -> bool:
    """Whether a checkpoint is in shards. Every process must ask, and all get the same answer.

    Raises:
        CheckpointError: Some processes see a folder, and some do not.
    """

    def look() -> bool:
        if _is_remote(path):
            return False
        recover(Path(path))
        return Path(path).is_dir()

    found = Processes.of(None).together(look)
    if len(set(found)) > 1:
        ranks = [rank for rank, one in enumerate(found) if not one]
        raise CheckpointError(f"{path}: processes {ranks} do not see this folder. All of them need its file system.")
    return found[0]


def read_together(io: CheckpointIO, path: _PATH, weights_only: bool | None) -> dict[str, Any]:
    """Read a file on every process; all raise if one cannot.

    Args:
        io: The strategy's plugin.
        path: The file, which all processes see. They share its verification.
        weights_only: See ``MuonCheckpointIO``.
    """
    if type(io) is MuonCheckpointIO and not _is_remote(path):
        checkpoint: dict[str, Any] = load_file_together(Path(path), weights_only=weights_only is not False)
        return checkpoint
    found: list[dict[str, Any]] = []
    Processes.of(None).together(lambda: found.append(io.load_checkpoint(path, **_asked(weights_only))))
    return found[0]


def _asked(weights_only: bool | None) -> dict[str, bool]:
    """The argument, if somebody has given it. Plugins of Lightning 2.5 have none, and nobody can give it there."""
    return {} if weights_only is None else {"weights_only": weights_only}
