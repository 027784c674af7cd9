"""Activations that are computed again in backward rather than kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpoint_activations"]


def checkpoint_activations(modules: Iterable[nn.Module]) -> None:
    """Keep only what goes into these modules, and run each again when backward comes to it.

    The module's ``forward`` is wrapped and the module stays in its place, so names of parameters stay the user's own;
    torch's ``checkpoint_wrapper`` puts a level between. Hooks are not run again: FSDP2 gathers a unit's weights for
    backward once, and the recomputation, within the unit, finds them there. So this can come before or after
    ``fully_shard``, but before ``module.compile()`` is first called.

    A module must compute the same again, and change nothing: models of ``transformers`` need
    ``config.use_cache = False``.

    Args:
        modules: What to wrap; a module that is checkpointed already is left as it is.
    """
    for module in modules:
        if not hasattr(module, "_checkpoint_wrapped_module") and not hasattr(module.forward, "_checkpointed"):
            module.forward = _recomputed(module.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    recomputed._checkpointed = True  # type: ignore[attr-defined]
    return recomputed
