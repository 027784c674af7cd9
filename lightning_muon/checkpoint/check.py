"""Does a checkpoint's model fit this one? Asked before a single weight is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_muon.checkpoint.errors import CheckpointError, some
from lightning_muon.names import canonical_name

__all__ = ["check_weights", "naming_what_differs"]


def check_weights(saved: Mapping[str, Any], module: nn.Module, *, strict: bool = True, source: str = "") -> None:
    """Raise unless the weights fit, by names without what wrappers add (``torch.compile``'s, say) and by shapes.

    For modules that do not translate old keys while they load, in hooks of their own. Shapes are those of whole
    parameters: a DTensor's local shard does not matter.

    Args:
        saved: Tensors by name, or anything with a ``shape``: the metadata of a sharded checkpoint will do.
        module: What the weights are for.
        strict: Names must be the same, too.
        source: Where ``saved`` comes from, to name it in the error.

    Raises:
        CheckpointError: Names (with ``strict``) or shapes differ.
    """
    if faults := _faults(saved, module, strict):
        raise CheckpointError(
            f"{source + ': ' if source else ''}These are the weights of another model. {faults}"
            " Build the model as the saved run did, or take another checkpoint. Nothing has been changed."
        )


@contextmanager
def naming_what_differs(saved: Mapping[str, Any], module: nn.Module, *, strict: bool = True) -> Iterator[None]:
    """Let torch load weights, which a module may translate while it does so, and say in short why it cannot.

    Args:
        saved: Tensors by name.
        module: What they are loaded into.
        strict: Names must be the same, too.

    Raises:
        CheckpointError: torch has refused them, and names or shapes differ.
    """
    try:
        yield
    except RuntimeError as error:
        faults = _faults(saved, module, strict)
        if not faults:
            raise
        raise CheckpointError(
            f"These are the weights of another model. {faults} Build the model as the saved run did, or take another"
            " checkpoint. What fits may have been loaded."
        ) from error


def _faults(saved: Mapping[str, Any], module: nn.Module, strict: bool) -> str:
    expected = {canonical_name(name): value for name, value in module.state_dict().items()}
    saved = {canonical_name(name): value for name, value in saved.items()}
    faults = []
    if strict:
        missing, unexpected = sorted(set(expected) - set(saved)), sorted(set(saved) - set(expected))
        if missing:
            faults.append(f"It lacks {some(missing)}.")
        if unexpected:
            faults.append(f"It also has {some(unexpected)}.")
    shapes = [
        f"{name} is {_shape(saved[name])} there and {_shape(value)} here"
        for name, value in expected.items()
        if name in saved and isinstance(value, Tensor) and _shape(saved[name]) != _shape(value)
    ]
    if shapes:
        faults.append(f"Shapes differ: {some(shapes)}.")
    return " ".join(faults)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))
