"""From a Hugging Face folder to a Lightning checkpoint, and back, without the model in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM
from lightning_muon.checkpoint.atomic import replacing
from lightning_muon.checkpoint.files import load_file, save_file

from .configuration import from_hugging_face, to_hugging_face
from .errors import ConversionError
from .keys import Part, check_keys, left_out, parts_of
from .reading import Weights, open_weights, read_json
from .writing import Tensors, copy_others, write_json, write_weights

__all__ = ["Converted", "empty_model", "from_hf", "to_hf"]

_BIAS = ".e_score_correction_bias"  # float32 whatever the weights are: its steps of 1e-3 would be lost


class Converted(NamedTuple):
    """What was converted.

    Attributes:
        config: The model's.
        num_parameters: Of it, buffers not counted.
        dtypes: Of its tensors.
        further: Keys of layers that predict further tokens, which were left out.
        copied: Files that were copied beside the weights.
        code: Python files that were not.
    """

    config: ModelConfig
    num_parameters: int
    dtypes: Sequence[torch.dtype]
    further: Sequence[str] = ()
    copied: Sequence[str] = ()
    code: Sequence[str] = ()


def empty_model(config: ModelConfig) -> MoELM:
    """The model without memory, for its names, shapes and hyper-parameters."""
    with torch.device("meta"):
        return MoELM(config)


def from_hf(folder: Path, checkpoint: Path, dtype: torch.dtype | None = None) -> Converted:
    """Make a checkpoint that ``MoELM.load_from_checkpoint`` loads out of a Hugging Face folder.

    Every tensor keeps its bits, unless another dtype is asked for; the routers' biases are float32. What is not in the
    folder (learning rates, the optimizer) has ``MoELM``'s defaults.

    Args:
        folder: With ``config.json`` and safetensors.
        checkpoint: A file; what is there is replaced, at once, when everything is written.
        dtype: Of the weights; ``None`` keeps theirs.

    Raises:
        ConversionError: The folder is incomplete, or not of a model that ``MoELM`` can be.
        OSError: It could not be written.
    """
    described = read_json(folder / "config.json")
    config = from_hugging_face(described)
    num_further = int(described.get("num_nextn_predict_layers", described.get("num_mtp_layers")) or 0)
    model = empty_model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with ExitStack() as stack:
        weights = stack.enter_context(open_weights(folder))
        parts = {name: parts_of(name, shape, weights.shapes.keys()) for name, shape in shapes.items()}
        further, tables = left_out(weights.shapes, config.num_hidden_layers, num_further)
        check_keys((part for own in parts.values() for part in own), weights.shapes, {*further, *tables})
        dtypes = {name: _dtype_of(name, dtype) or _common_dtype(weights, parts[name]) for name in shapes}
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {
            name: _assemble(weights, parts[name], shape, dtypes[name], checkpoint.parent)
            for name, shape in shapes.items()
        }
        content = {
            "epoch": 0,
            "global_step": 0,
            "pytorch-lightning_version": L.__version__,
            "state_dict": state,
            MoELM.CHECKPOINT_HYPER_PARAMS_NAME: "kwargs",
            MoELM.CHECKPOINT_HYPER_PARAMS_KEY: dict(model.hparams),
        }
        save_file(content, checkpoint)
    count = sum(parameter.numel() for parameter in model.parameters())
    return Converted(config, count, _dtypes(state), further)


def to_hf(
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    like: Path | None = None,
    copy_code: bool = False,
) -> Converted:
    """Make a folder that ``transformers`` loads as ``DeepseekV3ForCausalLM`` out of a checkpoint of ``MoELM``.

    Args:
        checkpoint: A file: by ``from_hf``, or by a Trainer under any strategy.
        folder: A new one, or an empty one. It is there when everything is written.
        dtype: Of the weights; ``None`` keeps theirs. The routers' biases are float32.
        max_shard_bytes: Of one file.
        like: A Hugging Face folder whose other files (tokenizer, generation, licence) are copied, and whose
            ``config.json`` is kept but for what differs.
        copy_code: Python files of that folder, too, and their mention in ``config.json``.

    Raises:
        ConversionError: The checkpoint is none of ``MoELM``, or the folder is not empty.
        CheckpointError: The checkpoint is missing, torn or altered.
        OSError: It could not be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConversionError(f"There is something at {folder} already: choose another name, or remove it.")
    if checkpoint.is_dir():
        raise ConversionError(
            f"{checkpoint} is a folder of shards. Make a file of it first: python -m"
            " lightning.fabric.utilities.consolidate_checkpoint FOLDER"
        )
    content = load_file(checkpoint)
    config, state = _model_of(checkpoint, content)
    model = empty_model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_keys((Part(name, shape) for name, shape in shapes.items()), {n: tuple(t.shape) for n, t in state.items()}, ())
    tensors: dict[str, Tensors] = {}
    for name, shape in shapes.items():
        for part in parts_of(name, shape):
            to = _dtype_of(name, dtype) or state[name].dtype
            get = partial(_piece, state[name], part.expert, to)
            tensors[part.key] = Tensors(prod(part.shape) * to.itemsize, get)
    base = None if like is None else read_json(like / "config.json")
    weights_dtype = dtype or state["lm_head.weight"].dtype
    written = to_hugging_face(config, weights_dtype, base, keep_code=copy_code)
    copied: list[str] = []
    code: list[str] = []
    with replacing(folder) as staged:
        staged.mkdir()
        if like is not None:
            copied, code = copy_others(like, staged, code=copy_code)
        if like is not None and written == base:
            (staged / "config.json").write_bytes((like / "config.json").read_bytes())
        else:
            write_json(staged / "config.json", written)
        for path in write_weights(staged, tensors, max_shard_bytes):
            shutil.copymode(staged / "config.json", path)  # safetensors makes files that nobody else can read
    count = sum(parameter.numel() for parameter in model.parameters())
    return Converted(config, count, [dtype] if dtype else _dtypes(state), (), copied, code)


def _common_dtype(weights: Weights, parts: list[Part]) -> torch.dtype:
    found = {weights.dtypes[part.key] for part in parts}
    if len(found) > 1:
        names = ", ".join(sorted(str(dtype) for dtype in found))
        raise ConversionError(
            f"{parts[0].key} and its stack's other matrices have several dtypes: {names}. Choose one."
        )
    return found.pop()


def _assemble(weights: Weights, parts: list[Part], shape: tuple[int, ...], dtype: torch.dtype, scratch: Path) -> Tensor:
    """One of our tensors: the file's own pages where nothing changes, else a scratch file's."""
    if len(parts) == 1 and parts[0].start is None and weights.dtypes[parts[0].key] == dtype:
        return weights[parts[0].key]
    out = _on_disk(shape, dtype, scratch)
    for part in parts:
        tensor = weights[part.key]
        if part.start is not None:
            tensor = tensor[:, part.start : part.start + shape[1]]
        (out if part.expert is None else out[part.expert]).copy_(tensor)
    return out


def _on_disk(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    """Memory that the kernel writes to a file when it needs the room. The file has no name: it ends with us."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=".scratch-")
    try:
        os.close(handle)
        return torch.from_file(name, shared=True, size=prod(shape), dtype=dtype).view(shape)
    except RuntimeError as error:  # torch's word for what the system refuses
        raise OSError(f"{folder} has no room for {prod(shape) * dtype.itemsize:,} bytes of scratch: {error}") from error
    finally:
        os.unlink(name)


def _piece(tensor: Tensor, expert: int | None, dtype: torch.dtype) -> Tensor:
    return (tensor if expert is None else tensor[expert]).to(dtype).contiguous()


def _dtype_of(name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    return torch.float32 if name.endswith(_BIAS) else dtype


def _dtypes(state: dict[str, Tensor]) -> list[torch.dtype]:
    return sorted({tensor.dtype for name, tensor in state.items() if not name.endswith(_BIAS)}, key=str)


def _model_of(checkpoint: Path, content: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
    try:
        config = ModelConfig.of(content[MoELM.CHECKPOINT_HYPER_PARAMS_KEY]["config"])
        state = dict(content["state_dict"])
    except (KeyError, TypeError) as error:
        raise ConversionError(
            f"{checkpoint} is no checkpoint of MoELM: it lacks the weights or the model's configuration ({error})."
        ) from error
    return config, state
