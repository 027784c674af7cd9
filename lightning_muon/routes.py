"""The decision on a parameter, and what it is decided from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lightning_muon.matrices import MatrixLayout

__all__ = ["Algorithm", "Candidate", "Route", "is_transposed", "muon_route"]

Algorithm = Literal["muon", "adamw"]


@dataclass(frozen=True)
class Route:
    """The decision on one parameter.

    Attributes:
        algorithm: ``"muon"`` or ``"adamw"``.
        rule: The rule that decided.
        layout: The matrices it is made of: what Muon orthogonalises, and what the monitors look at under AdamW too.
            ``None`` for a vector.
    """

    algorithm: Algorithm
    rule: str
    layout: MatrixLayout | None = None


@dataclass(frozen=True)
class Candidate:
    """What the rules may look at.

    Attributes:
        names: Every name of the parameter; several if it is tied.
        param: The parameter.
        modules: The module that owns it, for each name; empty when only names were given.
        parents: The modules that hold those.
    """

    names: tuple[str, ...]
    param: nn.Parameter
    modules: tuple[nn.Module, ...] = ()
    parents: tuple[nn.Module, ...] = ()

    def owned_by(self, *types: type[nn.Module]) -> bool:
        """Whether a module of one of these types owns the parameter."""
        return any(isinstance(module, types) for module in self.modules)

    def in_module_named(self, names: frozenset[str]) -> bool:
        """Whether the module that owns the parameter has one of these names (``lm_head`` in ``a.lm_head.weight``)."""
        return any(len(parts) > 1 and parts[-2] in names for parts in (n.lower().split(".") for n in self.names))


def muon_route(
    candidate: Candidate,
    rule: str,
    *,
    split_sizes: Sequence[int] | None = None,
    num_heads: int | Sequence[int] | None = None,
    transposed: bool = False,
    interleaved: int = 1,
    stacked: int = 1,
) -> Route:
    """Muon with the reading that the parameter's module and shape suggest."""
    shape = candidate.param.shape
    stack, rows, cols = 1, *shape[:1], 0
    if len(shape) < 2:
        raise ValueError("Muon needs a matrix; give this parameter algorithm='adamw'.")
    convolution = next((m for m in candidate.modules if isinstance(m, nn.modules.conv._ConvNd)), None)
    if convolution is not None:
        groups = convolution.groups
        stack, rows, cols = groups, shape[0] // groups, candidate.param.numel() // shape[0]
    elif len(shape) == 2:
        stack, rows, cols = stacked, shape[0] // stacked, shape[1]
    elif len(shape) == 3:
        stack, rows, cols = shape
    else:
        raise ValueError("Muon reads two or three dimensions; more only if they belong to a convolution.")
    layout = MatrixLayout.create(
        stack,
        rows,
        cols,
        split_sizes=split_sizes,
        num_heads=num_heads,
        transposed=transposed or is_transposed(candidate) or bool(convolution and convolution.transposed),
        interleaved=interleaved,
    )
    return Route("muon", rule, layout)


def is_transposed(candidate: Candidate) -> bool:
    """``transformers``' Conv1D (GPT-2) is a Linear that stores ``(in, out)``; known by name, not to depend on it."""
    return any(kind.__name__ == "Conv1D" for module in candidate.modules for kind in type(module).__mro__)
