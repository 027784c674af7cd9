"""A model's folder: its weights in safetensors files, and what else belongs to it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from .reading import INDEX, SINGLE

__all__ = ["Tensors", "copy_others", "parse_size", "write_json", "write_weights"]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


class Tensors(NamedTuple):
    """A tensor to be written: how large, and how to get it.

    Attributes:
        num_bytes: Of it.
        get: Reads it, when its file's turn comes.
    """

    num_bytes: int
    get: Callable[[], Tensor]


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` or ``512MiB``.

    Raises:
        ValueError: It is none, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B)?", text.strip(), flags=re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise ValueError(f"{text!r} is no size: write 5GB, 500MB or 512MiB, say")
    return size


def write_weights(folder: Path, tensors: Mapping[str, Tensors], max_shard_bytes: int) -> list[Path]:
    """Write ``model.safetensors``, or shards and their index, one file in memory at a time at the most.

    Args:
        folder: Where to; it is there.
        tensors: By key, in the order in which they fill the files.
        max_shard_bytes: A file begins anew before it would grow beyond this. A larger tensor has a file of its own.

    Returns:
        The files of weights.
    """
    shards = _cut({key: tensor.num_bytes for key, tensor in tensors.items()}, max_shard_bytes)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    names = [SINGLE] if len(shards) == 1 else names
    for name, keys in zip(names, shards, strict=True):
        save_file({key: tensors[key].get() for key in keys}, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(tensor.num_bytes for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    return [folder / name for name in names]


def copy_others(source: Path, target: Path, *, code: bool) -> tuple[list[str], list[str]]:
    """Copy a folder's files that are neither weights nor ``config.json``: tokenizer, generation, licence, card.

    Args:
        source: From there; files directly in it, hidden ones left out. Links are followed (a cache consists of them).
        target: To there.
        code: Python files, too.

    Returns:
        Names that were copied, and names of Python files that were not.
    """
    files = sorted(path for path in source.iterdir() if path.is_file() and not path.name.startswith("."))
    others = [path for path in files if path.name != "config.json" and not path.name.endswith(_WEIGHTS)]
    copied = [path for path in others if code or path.suffix != ".py"]
    for path in copied:
        shutil.copyfile(path, target / path.name)
    return [path.name for path in copied], [path.name for path in others if path not in copied]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As ``transformers`` writes it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _cut(sizes: Mapping[str, int], most: int) -> Sequence[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards
