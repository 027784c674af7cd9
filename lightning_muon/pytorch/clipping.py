"""The Trainer clips through its precision plugin, whatever that is; only the norm has to be another."""

from __future__ import annotations

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import Precision
from torch.optim import Optimizer

from lightning_muon.sharding.clipping import ClipScope, clip_grad_norm_
from lightning_muon.sharding.require import require_muon

__all__ = ["clip_by_the_whole_norm", "restore_clipping"]


def clip_by_the_whole_norm(plugin: Precision, strategy: str, scope: ClipScope) -> None:
    """Have a precision plugin clip by the norm of the gradients of all processes.

    Args:
        plugin: The plugin; changed in place.
        strategy: The strategy's name, for error messages.
        scope: What is clipped.
    """

    def clip(optimizer: Optimizer, clip_val: float) -> None:
        bare = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        clip_grad_norm_(require_muon(bare, strategy), clip_val, scope=scope)

    plugin.clip_grad_by_norm = clip  # type: ignore[method-assign]


def restore_clipping(plugin: Precision) -> None:
    """Give the plugin its own way back."""
    plugin.__dict__.pop("clip_grad_by_norm", None)
