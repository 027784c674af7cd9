"""A folder of safetensors: what is in it, checked, and its tensors one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ConversionError, some

__all__ = ["INDEX", "SINGLE", "Weights", "open_weights", "read_json"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Weights:
    """The tensors of a folder. They stay in their files until they are read.

    Attributes:
        shapes: By key.
        dtypes: By key.
    """

    def __init__(self, files: Mapping[str, Any]) -> None:
        self._files = files
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        other: dict[str, str] = {}
        for key, file in files.items():
            tensor = file.get_slice(key)
            self.shapes[key] = tuple(tensor.get_shape())
            if tensor.get_dtype() in _FLOATS:
                self.dtypes[key] = _FLOATS[tensor.get_dtype()]
            else:
                other[key] = tensor.get_dtype()
        if other:
            raise ConversionError(
                f"{len(other)} tensors are no floating-point numbers of 16 bits or more:"
                f" {some([f'{key} ({kind})' for key, kind in other.items()])}. Convert them to bfloat16 first."
            )

    def __getitem__(self, key: str) -> Tensor:
        """The tensor, whose memory are the file's own pages: do not write to it."""
        tensor: Tensor = self._files[key].get_tensor(key)
        return tensor


@contextmanager
def open_weights(folder: Path) -> Iterator[Weights]:
    """Open ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names.

    Raises:
        ConversionError: A file is missing, cut off or of another kind, or a key is missing or there twice.
    """
    index = _read_index(folder)
    names = [SINGLE] if index is None else sorted(set(index.values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ConversionError(
            f"{folder} lacks {len(absent)} of its {len(names)} files of weights: {some(absent)}. Download them."
        )
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        twice = []
        for name in names:
            try:
                file = stack.enter_context(safe_open(folder / name, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ConversionError(f"{folder / name} is cut off or altered ({error}). Download it again.") from error
            for key in file.keys():  # noqa: SIM118 (no mapping)
                if key in files:
                    twice.append(key)
                files[key] = file
                if index is not None and index.get(key) != name:
                    twice.append(key)
        if index is not None and (twice or index.keys() - files.keys()):
            wrong = sorted({*twice, *(index.keys() - files.keys())})
            raise ConversionError(f"{folder / INDEX} and its files do not agree on where these are: {some(wrong)}.")
        yield Weights(files)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        ConversionError: It is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path.parent} has no {path.name}: is it a Hugging Face model's folder?") from error
    except ValueError as error:
        raise ConversionError(f"{path} is no JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} is no JSON object.")
    return content


def _read_index(folder: Path) -> dict[str, str] | None:
    """In which file each key is; ``None`` if all are in one file."""
    single, several = (folder / SINGLE).exists(), (folder / INDEX).exists()
    if single and several:
        raise ConversionError(f"{folder} holds both {SINGLE} and {INDEX}: remove the one that is not meant.")
    if not several:
        if not single:
            shards = some(sorted(path.name for path in folder.glob("*.safetensors"))) or "no file of that kind"
            raise ConversionError(f"{folder} has neither {SINGLE} nor {INDEX} ({shards}). Other formats are not read.")
        return None
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise ConversionError(f"{folder / INDEX} has no weight_map.")
    outside = sorted({name for name in index.values() if Path(name).name != name})
    if outside:
        raise ConversionError(f"{folder / INDEX} names files outside the folder: {some(outside)}.")
    return index
