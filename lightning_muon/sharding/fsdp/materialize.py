"""Modules that were built on the meta device get their memory, and the values that they would have been built with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Materializer", "require_initializers"]


def require_initializers(module: nn.Module) -> None:
    """Check that whatever is on the meta device can be given values.

    Raises:
        TypeError: A module has tensors of its own on the meta device and no ``reset_parameters``.
    """
    for name, part in module.named_modules():
        on_meta = [key for key, tensor in _own_tensors(part) if tensor.is_meta]
        if on_meta and _initializer(part) is None:
            where = f"{type(part).__qualname__} ({name})" if name else type(part).__qualname__
            raise TypeError(
                f"{where} has {', '.join(on_meta)} on the meta device and no reset_parameters() that would give"
                " values. Define that method, which must set every parameter and buffer of the module's own, or build"
                " the model without empty_init=True and without torch.device('meta')."
            )


class Materializer:
    """Gives modules memory, each in its turn; a tensor that several of them share stays one tensor.

    The values are those of one process that calls ``reset_parameters()`` of the same modules in the same order with the
    same seed. They are those of a module built without the meta device if its constructors initialise by
    ``reset_parameters()`` in the order of ``module.modules()``, as torch's layers do, and nothing initialises again
    later.

    Args:
        device: Where the tensors go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._made: dict[Tensor, Tensor] = {}

    def materialize(self, module: nn.Module) -> None:
        """Allocate the module's own meta tensors, not those of modules inside, and have it set them."""
        fresh = [tensor for _, tensor in _own_tensors(module) if tensor.is_meta and tensor not in self._made]
        for tensor in fresh:
            self._made[tensor] = self._empty(tensor)
        own: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in own:
            for key, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[key] = self._made[tensor]
        initialize = _initializer(module)
        if fresh and initialize is not None:
            with torch.device(self.device), torch.no_grad():  # buffers that are computed anew
                initialize()

    def _empty(self, tensor: Tensor) -> Tensor:
        empty = torch.empty_like(tensor, device=self.device, requires_grad=False)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, tensor.requires_grad)
            empty.__dict__.update(tensor.__dict__)  # marks that users put on parameters
        return empty


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))


def _initializer(module: nn.Module) -> Callable[[], object] | None:
    # torch's own attention and transformer have it with an underscore
    for name in ("reset_parameters", "_reset_parameters"):
        method = getattr(module, name, None)
        if callable(method):
            return method  # type: ignore[no-any-return]
    return None
