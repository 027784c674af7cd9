"""The index of a sharded checkpoint, unpickled without running code.

``torch.distributed.checkpoint`` keeps it in the file ``.metadata``, a pickle, and loads that with ``pickle.load``: a
prepared one can run anything. Here it may name the classes it is made of and no others.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from typing_extensions import override

from lightning_muon.checkpoint.errors import some, unusable

__all__ = ["METADATA", "SafeReader", "read_metadata"]

METADATA = ".metadata"

_INDEX = "torch.distributed.checkpoint.metadata"
_FILES = "torch.distributed.checkpoint.filesystem"
_ALLOWED = frozenset(
    {
        (_INDEX, "Metadata"),
        (_INDEX, "TensorStorageMetadata"),
        (_INDEX, "BytesStorageMetadata"),
        (_INDEX, "ChunkStorageMetadata"),
        (_INDEX, "TensorProperties"),
        (_INDEX, "MetadataIndex"),
        (_INDEX, "StorageMeta"),
        (_INDEX, "_MEM_FORMAT_ENCODING"),
        (_FILES, "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        # where the checkpoint was saved; by Lightning's own strategies
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
    }
)


class _MetadataUnpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        if module == "pathlib._local":  # as Python 3.13 calls it
            module = "pathlib"
        if (module, name) in _ALLOWED:
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")


def read_metadata(folder: Path, files: Iterable[str] | None = None) -> Metadata:
    """The index of the checkpoint in ``folder``: its tensors, their shapes and dtypes, and where their pieces lie.

    Args:
        folder: The checkpoint.
        files: Names of the files it consists of, if known: the index may point to no others.

    Raises:
        CheckpointError: It is missing, altered, or holds what would run code.
    """
    try:
        with open(folder / METADATA, "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        if metadata.planner_data is None:  # saved as one flat dictionary
            metadata.planner_data = {key: (key,) for key in metadata.state_dict_metadata}
        used = {str(info.relative_path) for info in metadata.storage_data.values()}
    except FileNotFoundError as error:
        raise unusable(folder, f"It has no {METADATA}: it is no sharded checkpoint, or was not completed.") from error
    except MemoryError:
        raise
    except Exception as error:  # a broken pickle may raise anything
        raise unusable(folder, f"Its {METADATA} is altered or unsafe: {error}. It has not been loaded.") from error
    strangers = used - set(files if files is not None else [name for name in used if Path(name).name == name])
    if strangers:
        raise unusable(folder, f"Its {METADATA} points to files that are not its own: {some(sorted(strangers))}.")
    return metadata


class SafeReader(FileSystemReader):
    """torch's reader, for an index that has been read already.

    Args:
        folder: The checkpoint.
        metadata: What ``read_metadata`` gave.
    """

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        # load_id is for torch's own log
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata
