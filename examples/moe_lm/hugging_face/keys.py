"""Which keys of a Hugging Face checkpoint a parameter of ours is made of.

The names agree, except for the experts. Ours are stacks ``(E, out, in)``: ``gate_proj``, ``up_proj``, ``down_proj``.
Published checkpoints have one key per expert and projection (``experts.3.gate_proj.weight``); ``transformers`` 5 holds
stacks in memory, with gate and up in one (``experts.gate_up_proj``), and may save them so.

Shape letters: E experts, I an expert's inner width, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from .errors import ConversionError, some

__all__ = ["Part", "check_keys", "left_out", "parts_of"]

_STACK = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<projection>gate_proj|up_proj|down_proj)$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_ROTATION = re.compile(r"\.rotary_emb\.inv_freq$")


class Part(NamedTuple):
    """A piece of one of our tensors, and where it lies in a Hugging Face checkpoint.

    Attributes:
        key: The checkpoint's name.
        shape: Of the whole tensor under that name.
        expert: Which matrix of our stack it is; ``None``: it is the whole tensor.
        start: Of a fused key, the first row (dimension 1) that is ours; ``None``: all are.
    """

    key: str
    shape: tuple[int, ...]
    expert: int | None = None
    start: int | None = None


def parts_of(name: str, shape: tuple[int, ...], keys: Collection[str] = ()) -> list[Part]:
    """The parts that make up one of our tensors, in their order.

    Args:
        name: In ``MoELM.state_dict()``.
        shape: Of it.
        keys: What the checkpoint has: decides between fused stacks and a key per expert, which is also what is
            written.
    """
    match = _STACK.match(name)
    if match is None:
        return [Part(name, shape)]
    experts, projection = match["experts"], match["projection"]
    num, rows, columns = shape
    if projection == "down_proj" and name in keys:
        return [Part(name, shape)]
    fused = f"{experts}.gate_up_proj"
    if projection != "down_proj" and fused in keys:
        return [Part(fused, (num, 2 * rows, columns), start=0 if projection == "gate_proj" else rows)]
    return [Part(f"{experts}.{e}.{projection}.weight", (rows, columns), expert=e) for e in range(num)]


def left_out(keys: Iterable[str], num_layers: int, num_further: int) -> tuple[list[str], list[str]]:
    """Keys that the model has no use for.

    Args:
        keys: Of the checkpoint.
        num_layers: Of the model.
        num_further: How many layers behind those the configuration speaks of; keys of more are unexpected.

    Returns:
        Those of the layers behind the last, which predict further tokens (DeepSeek-V3's ``model.layers.61``), and the
        tables of rotary frequencies that old versions saved, which follow from ``rope_theta``.
    """
    further, tables = [], []
    for key in keys:
        layer = _LAYER.match(key)
        if layer and num_layers <= int(layer[1]) < num_layers + num_further:
            further.append(key)
        elif _ROTATION.search(key):
            tables.append(key)
    return further, tables


def check_keys(parts: Iterable[Part], shapes: Mapping[str, tuple[int, ...]], ignored: Collection[str]) -> None:
    """Check that a checkpoint holds what is needed, in the shapes that are needed, and nothing else.

    Args:
        parts: Of all our tensors.
        shapes: What the checkpoint has.
        ignored: Keys that may be there.

    Raises:
        ConversionError: All that does not fit, in one text.
    """
    expected = {part.key: part.shape for part in parts}
    missing = sorted(expected.keys() - shapes.keys())
    unexpected = sorted(shapes.keys() - expected.keys() - set(ignored))
    wrong = [
        f"{key} is {shapes[key]}, expected {shape}"
        for key, shape in sorted(expected.items())
        if key in shapes and shapes[key] != shape
    ]
    troubles = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    found = [f"{len(names)} {what}: {some(names)}" for what, names in troubles.items() if names]
    if any(key.endswith("_scale_inv") for key in unexpected):
        found.append("weight_scale_inv belongs to 8-bit weights: convert them to bfloat16 first")
    if found:
        raise ConversionError(
            "The weights are not those of the model that config.json describes. " + "; ".join(found) + "."
        )
