"""The monitors: which measures each logs, and how often."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from lightning_muon.monitoring import Collection
from lightning_muon.pytorch.callbacks.base import Monitor

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["SpectrumMonitor", "UpdateRMSMonitor", "WeightNormMonitor"]


class UpdateRMSMonitor(Monitor):
    """The size of each parameter's update, before weight decay and without the learning rate.

    | key | meaning | unit | cost |
    |---|---|---|---|
    | `muon/update_rms/<name>` | `√mean(u²)` of `W ← W - lr·(u + λW)` | 1 | none; AdamW: a pass over its state |

    Muon with ``scale="match_rms_adamw"`` aims at 0.2; a momentum of low rank, or a sequence that stops short of 1,
    stays below. Far below means that most directions of the momentum are not lifted. Every parameter, every
    ``log_every_n_steps`` steps. Aggregates over the parameters: ``_min``, ``_mean``, ``_max``.
    """

    families: ClassVar[tuple[str, ...]] = ("update_rms",)


class WeightNormMonitor(Monitor):
    """The size of each weight.

    | key | meaning | unit | cost |
    |---|---|---|---|
    | `muon/weight_rms/<name>` | `√mean(w²)` | of the weight | a pass over the weights |
    | `muon/weight_spectral_norm/<name>` | largest singular value | of the weight | `eigvalsh(WWᵀ)`, float64 |

    Every parameter (its matrices, for the spectral norm), every ``log_every_n_steps`` steps. Under weight decay both
    should level off; without it they grow (Moonlight, arXiv 2502.16982, §2.2).
    """

    families: ClassVar[tuple[str, ...]] = ("weight_rms", "weight_spectral_norm")


class SpectrumMonitor(Monitor):
    """The singular values of each weight matrix.

    | key | meaning | unit | cost |
    |---|---|---|---|
    | `muon/weight_svd_entropy/<name>` | `-Σ p ln p / ln n`, `p = σ²/Σσ²` | 0 … 1 | `eigvalsh(WWᵀ)`, float64 |
    | `muon/weight_stable_rank/<name>` | `‖W‖_F²/σ₁²` | 1 … n | the same |
    | `muon/weight_singular_values/<name>` | histogram of σ (TensorBoard only) | of the weight | the same |

    Every 200 steps. Muon keeps the entropy above AdamW's (Moonlight, §3.4: in over 90 % of the matrices).
    """

    families: ClassVar[tuple[str, ...]] = ("weight_svd_entropy", "weight_stable_rank")

    @override
    def default_interval(self, trainer: pl.Trainer) -> int:
        return 200

    @override
    def show(self, trainer: pl.Trainer, collection: Collection) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, sigma in collection.spectra.items():
                    if self.request.wants(name):
                        tag = f"muon/weight_singular_values/{name}"
                        logger.experiment.add_histogram(tag, sigma.numpy(), trainer.global_step)
