"""Parameters whose new values are still on their way: whoever reads one waits for it, and for nothing else.

A hook before a module's forward would not do. Attention reads its output projection's weight without calling that
module, a tied head reads another module's, an average of the weights takes all of them from a list; each would silently
get last step's values. So the wait hangs on the tensor: while it is in flight a parameter has the class `InFlight`,
whose `__torch_function__` sees its uses by torch's Python functions, waits, and gives the class back. (torch itself
turns a lazy module's `UninitializedParameter` into a `Parameter` like this.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch._guards import TracingContext

__all__ = ["Flight", "InFlight", "arrive", "can_depart", "depart"]

# What may be asked of a parameter in flight without waiting, because it does not depend on the values.
_ATTRIBUTES = (
    *("device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_sparse", "layout"),
    *("ndim", "requires_grad", "shape"),
)
_METHODS = (
    *("dim", "element_size", "is_contiguous", "is_floating_point", "is_complex", "numel", "size", "stride"),
    *("__hash__", "register_hook", "register_post_accumulate_grad_hook"),
)
_GRAD = vars(torch._C.TensorBase)["grad"]
_VALUE_FREE: frozenset[Any] = frozenset(
    [getattr(Tensor, name).__get__ for name in _ATTRIBUTES]
    + [getattr(Tensor, name) for name in _METHODS]
    + [_GRAD.__set__, _GRAD.__delete__]
)


class Flight(Protocol):
    """Parameters that travel together."""

    def land(self) -> None:
        """Wait, write the new values, and call `arrive`. A second call does nothing."""

    def seen_by_compiler(self) -> None:
        """The compiler came across one of the parameters."""


class InFlight(nn.Parameter):
    """The class of a parameter in flight."""

    flight: Flight

    def __new__(cls, *args: Any, **kwargs: Any) -> nn.Parameter:  # type: ignore[misc]
        """`type(param)(data)` makes a parameter like any other."""
        return nn.Parameter(*args, **kwargs)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Wait for every parameter in flight among the arguments, then do what was wanted."""
        if func in _VALUE_FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        for param in _in_flight((args, kwargs)):
            _land(param)
        return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self.flight.land()
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.flight.land()
        return self.__reduce_ex__(protocol)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _land(param: InFlight) -> None:
    # Not to be traced: it asks about the compiler, and waits. The compiler looks at a tensor before it traces its use,
    # and in torch 2.11 is_compiling() is False while it does.
    if torch.compiler.is_compiling() or TracingContext.try_get() is not None:
        param.flight.seen_by_compiler()
    param.flight.land()


def _in_flight(arguments: Any) -> Iterator[InFlight]:
    if isinstance(arguments, InFlight):
        yield arguments
    elif isinstance(arguments, (list, tuple)):
        for argument in arguments:
            yield from _in_flight(argument)
    elif isinstance(arguments, dict):
        yield from _in_flight(tuple(arguments.values()))


def can_depart(param: nn.Parameter) -> bool:
    """Whether the parameter's class leaves `__torch_function__` to us."""
    return type(param) is nn.Parameter


def depart(param: nn.Parameter, flight: Flight) -> None:
    """From now on every use of the parameter lands the flight."""
    param.__class__ = InFlight
    cast(InFlight, param).flight = flight


def arrive(param: nn.Parameter) -> None:
    """The parameter is again what it was."""
    if isinstance(param, InFlight):
        del param.flight
        cast(Any, param).__class__ = nn.Parameter
