"""What a router has chosen, read from what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Read", "Routing", "read_by", "read_output"]

Read = Callable[[nn.Module, tuple[Any, ...], Any], tuple[Tensor, Tensor | None, int]]
"""`(module, inputs, output)` of a router's forward to `(experts, scores, num_experts)`: the chosen experts, integers
`(..., K)`; the scores, not negative, `(..., num_experts)`, or `None`; the number of experts."""

_INTEGERS = (torch.int16, torch.int32, torch.int64)
_SIZES = ("num_experts", "n_routed_experts", "out_features")


@dataclass(frozen=True)
class Routing:
    """What a router has chosen for N tokens.

    Attributes:
        experts: The chosen experts, `(..., K)`.
        num_experts: E.
        scores: Scores or logits of all experts, `(..., E)`.
        weights: The chosen experts' weights, `(..., K)`, from which can be told how they came from the scores;
            `None`: the scores are what they are called.
    """

    experts: Tensor
    num_experts: int
    scores: Tensor | None = None
    weights: Tensor | None = None


def read_output(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Routing:
    """Read what most routers return, in any order: a tuple of the chosen experts, as integers `(..., K)`, their weights
    `(..., K)` and the scores or logits of all, `(..., E)`.

    So do nearly all routers of `transformers` 5 (logits, weights, experts). The scores may be missing.

    Raises:
        TypeError: The output is something else.
    """
    tensors = [one for one in output if isinstance(one, Tensor)] if isinstance(output, tuple) else []
    integers = [one for one in tensors if one.dtype in _INTEGERS and one.ndim >= 2]
    if len(integers) != 1:
        raise TypeError(_not_understood(module, output))
    (experts,) = integers
    beside = [one for one in tensors if one.is_floating_point() and one.shape[:-1] == experts.shape[:-1]]
    scores = next((one for one in beside if one.shape[-1] > experts.shape[-1]), None)
    weights = next((one for one in beside if one.shape[-1] == experts.shape[-1]), None)
    num_experts = scores.shape[-1] if scores is not None else _size(module)
    if num_experts is None or num_experts <= experts.shape[-1]:  # not a choice: a mask of all experts, say
        raise TypeError(_not_understood(module, output))
    if weights is None or experts.shape[-1] < 2:
        return Routing(experts, num_experts)  # nothing tells scores from logits
    return Routing(experts, num_experts, scores, weights)


def read_by(read: Read) -> Callable[[nn.Module, tuple[Any, ...], Any], Routing]:
    """The user's own reading, checked.

    Raises:
        TypeError: It gives something else than it should.
    """

    def checked(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Routing:
        found = read(module, inputs, output)
        if not (isinstance(found, tuple) and len(found) == 3 and _is_routing(*found)):
            raise TypeError(
                f"read= has to return (experts, scores, num_experts): integers (tokens, k), None or floating-point"
                f" scores (tokens, num_experts), and an int. Of {type(module).__name__} it gave {_describe(found)}."
            )
        experts, scores, num_experts = found
        return Routing(experts, num_experts, scores)

    return checked


def _is_routing(experts: Any, scores: Any, num_experts: Any) -> bool:
    if not isinstance(experts, Tensor) or experts.dtype not in _INTEGERS or experts.ndim < 2:
        return False
    if not isinstance(num_experts, int) or num_experts < 1:
        return False
    if scores is None:
        return True
    shape = (*experts.shape[:-1], num_experts)
    return isinstance(scores, Tensor) and scores.is_floating_point() and scores.shape == shape


def _size(module: nn.Module) -> int | None:
    sizes = [getattr(module, name) for name in _SIZES if isinstance(getattr(module, name, None), int)]
    return sizes[0] if sizes else None


def _not_understood(module: nn.Module, output: Any) -> str:
    return (
        f"What the router {type(module).__name__} returns is not understood: {_describe(output)}. Expected is a tuple"
        " with one tensor of integers, the chosen experts (tokens, k), and beside it their weights (tokens, k) and the"
        " scores of all experts (tokens, experts). Pass read=, a function from (module, inputs, output) to (experts,"
        " scores or None, number of experts); or leave the layer out, by exclude=."
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_describe, value))})"
    return type(value).__name__ if not isinstance(value, int | None) else repr(value)
