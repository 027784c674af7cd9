"""Importing the package makes its strategy names known to Trainer and Fabric."""

from __future__ import annotations

from typing import Any, NoReturn

from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from lightning_muon import fabric, pytorch

_ZERO1 = ("muon_zero1", "muon_zero1_spawn", "muon_zero1_notebook", "muon_zero1_find_unused_parameters_true")


def register() -> None:
    """Register the strategies; doing it twice changes nothing."""
    for tree, registry in ((pytorch, StrategyRegistry), (fabric, STRATEGY_REGISTRY)):
        tree.MuonZero1Strategy.register_strategies(registry)
        tree.MuonFSDPStrategy.register_strategies(registry)
    _explain_the_other_package()


def _explain_the_other_package() -> None:
    """``pip install lightning`` brings ``pytorch_lightning`` along, a second tree of the same classes with registries
    of its own. There our names would only be "invalid"; registered like this, they say what to do."""
    try:
        from pytorch_lightning.strategies import StrategyRegistry as OtherRegistry
    except ImportError:
        return
    for name in (*_ZERO1, "muon_fsdp"):
        OtherRegistry.register(name, _refuse, description="for lightning.pytorch.Trainer only", override=True)


def _refuse(**_: Any) -> NoReturn:
    raise TypeError(
        "lightning_muon's strategies are for `lightning.pytorch.Trainer`, and this is `pytorch_lightning.Trainer`, of"
        " another package with the same classes. Write `import lightning.pytorch as pl` (or `import lightning as L`)"
        " in place of `import pytorch_lightning as pl`, and let your LightningModule inherit from it too."
    )
