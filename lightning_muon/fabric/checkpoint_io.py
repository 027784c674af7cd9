"""Lightning's plugin for checkpoints on disk: whole or absent, verified, from one file or from a sharded folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from typing_extensions import override

from lightning_muon.checkpoint.atomic import remove
from lightning_muon.checkpoint.canonical import load_canonical
from lightning_muon.checkpoint.files import save_file

__all__ = ["MuonCheckpointIO"]


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
            return super().load_checkpoint(path, map_location, weights_only)
        return load_canonical(Path(path), weights_only=weights_only is not False)

    @override
    def remove_checkpoint(self, path: _PATH) -> None:
        if _is_remote(path):
            super().remove_checkpoint(path)
        else:
            remove(Path(path))


def _is_remote(path: _PATH) -> bool:
    return "://" in str(path)
