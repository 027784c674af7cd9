"""The optimizer that the strategies can shard."""

from __future__ import annotations

from torch.optim import Optimizer

from lightning_muon.muon import Muon

__all__ = ["require_muon"]


def require_muon(optimizer: Optimizer, strategy: str) -> Muon:
    """The optimizer, if it is one that the strategy can shard.

    Raises:
        TypeError: It is another optimizer.
    """
    if isinstance(optimizer, Muon):
        return optimizer
    raise TypeError(
        f"{strategy} needs lightning_muon.Muon and got {type(optimizer).__module__}.{type(optimizer).__qualname__}."
        " Return `lightning_muon.Muon(self, lr=...)` from configure_optimizers (or pass it to fabric.setup); it trains"
        " what is no matrix by AdamW. To train everything by AdamW under this strategy, pass lm.Muon the group"
        ' [{"params": list(self.named_parameters()), "algorithm": "adamw"}].'
    )
