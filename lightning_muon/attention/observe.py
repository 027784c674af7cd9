"""What attention computes while a model trains: its queries and keys are seen on their way, and not kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_muon.attention.find import Attention
from lightning_muon.attention.logits import max_logits

__all__ = ["LogitObserver", "observe_attention"]

_ATTENTION = F.scaled_dot_product_attention


class LogitObserver:
    """Keeps the largest logit of each head of one attention module, over its training forwards since ``reset``.

    ``torch.nn.functional.scaled_dot_product_attention`` is seen where the module calls it, also from compiled code:
    hooks of the module break the compiled graph around it. What is computed again in backward (activation
    checkpointing) has been seen before. A module that computes attention otherwise calls ``observe_attention``.

    Args:
        attention: The module.

    Attributes:
        is_on: Whether to look at what comes.
        maxima: ``(heads,)`` float32; ``None`` if there was nothing to see.
        has_run: Whether the module has run in training since ``reset``.
    """

    def __init__(self, attention: Attention) -> None:
        self.attention = attention
        self.is_on = True
        self.maxima: Tensor | None = None
        self.has_run = False
        self._modes: list[_Eavesdropper] = []
        module = attention.module
        self._handles = [
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after, always_call=True),
        ]
        _observers.setdefault(module, WeakSet()).add(self)

    def reset(self) -> None:
        """Forget what was seen."""
        self.maxima, self.has_run = None, False

    def close(self) -> None:
        """Leave the module as it was."""
        for handle in self._handles:
            handle.remove()
        if self.attention.module in _observers:
            _observers[self.attention.module].discard(self)

    # not compiled: that would be done anew whenever the state of this object changes
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def see(self, query: Tensor, key: Tensor, **options: Any) -> None:
        """Take in one call of attention.

        Args:
            query: See ``max_logits``.
            key: See there.
            options: See there.

        Raises:
            ValueError: There are other heads than were described.
        """
        if not self._looks:
            return
        num_heads = self.attention.heads.num_heads
        if query.ndim < 3 or query.shape[-3] != num_heads:
            raise ValueError(
                f"{self.attention.name}: attention got queries of shape {tuple(query.shape)}, and"
                f" (..., {num_heads} heads, queries, width) was expected. Describe the module by heads=, or leave it"
                " out by exclude=. (Heads that tensor parallelism has split are not supported.)"
            )
        found = max_logits(query, key, **options).float()
        self.maxima = found if self.maxima is None else torch.maximum(self.maxima, found)

    @property
    def _looks(self) -> bool:
        # in backward: activations that are computed again
        return self.is_on and self.attention.module.training and torch._C._current_graph_task_id() == -1

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, module: nn.Module, inputs: Any) -> None:
        if self._looks:
            self.has_run = True
            mode = _Eavesdropper(self.see)
            mode.__enter__()  # type: ignore[no-untyped-call]
            self._modes.append(mode)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._modes:
            self._modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


_observers: WeakKeyDictionary[nn.Module, WeakSet[LogitObserver]] = WeakKeyDictionary()


def observe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> None:
    """Tell whoever watches an attention module what its queries and keys are.

    Call it in the module's ``forward`` where attention is not computed by
    ``torch.nn.functional.scaled_dot_product_attention`` (flash-attn, a kernel of your own). It does nothing if nobody
    watches, or in evaluation.

    Args:
        module: The attention module.
        query: ``(..., heads, queries, width)``; flash-attn has heads and queries the other way round.
        key: ``(..., key heads, keys, width)``.
        is_causal: As in torch's function.
        attn_mask: As there.
        scale: As there; ``None`` means ``1/√width``.

    Raises:
        ValueError: The shapes do not go together, or there are other heads than were described.
    """
    _tell(module, query, key, {"is_causal": is_causal, "attn_mask": attn_mask, "scale": scale})


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _tell(module: nn.Module, query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
    for observer in _observers.get(module, ()):
        observer.see(query, key, **options)


class _Eavesdropper(TorchFunctionMode):
    """Sees torch's attention function being called."""

    def __init__(self, tell: Callable[..., None]) -> None:
        super().__init__()
        self._tell = tell

    @override
    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _ATTENTION:
            self._see(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _see(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        self._tell(query, key, is_causal=is_causal, attn_mask=attn_mask, scale=scale)
