"""The monitors: which measures each logs, and how often."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from lightning_muon.fabric.loggers import Loggers
from lightning_muon.monitoring import Collection
from lightning_muon.monitoring.description import describe_model, log_folders
from lightning_muon.pytorch.callbacks.base import Monitor, parameter_names

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import Logger

__all__ = ["MomentumSpectrumMonitor", "SpectrumMonitor", "UpdateRMSMonitor", "WeightNormMonitor"]

# Tenths of a decade from 1e-8, which float64 resolves of XXᵀ, to 1.
_LOG10_EDGES = np.linspace(-8, 0, 81)


class UpdateRMSMonitor(Monitor):
    """The size of each parameter's update, before weight decay and without the learning rate.

    | key | meaning | unit | cost |
    |---|---|---|---|
    | `muon/update_rms/<name>` | `√mean(u²)` of `W ← W - lr·(u + λW)` | 1 | none; AdamW: a pass over its state |
    | `muon/update_weight_ratio/<name>` | `lr·‖u‖_F/‖W‖_F` | 1 | a pass over the weights |
    | `muon/momentum_participation_rank/<name>` | `(Σσ²)²/Σσ⁴` of what is orthogonalised | 1 … r | two norms of `XXᵀ` |
    | `muon/ns_residual/<name>` | `‖XXᵀ-I‖_F/√rank` before the last Newton–Schulz step | 1 | a copy of `XXᵀ` |

    Muon with ``scale="match_rms_adamw"`` aims at 0.2; a momentum of low rank, or a sequence that stops short of 1,
    stays below. Far below means that most directions of the momentum are not lifted. Every parameter, every
    ``log_every_n_steps`` steps. Aggregates over the parameters: ``_min``, ``_mean``, ``_max``. Other optimizers of
    torch are seen by the difference of the weights.

    Alarms: a residual more than 10 % above what the polynomial sequence allows, or not finite; an update more than 10 %
    larger than it allows, or less than a quarter of an orthogonal one in three measurements in a row.
    """

    families: ClassVar[tuple[str, ...]] = (
        "update_rms",
        "update_weight_ratio",
        "momentum_participation_rank",
        "ns_residual",
    )


class WeightNormMonitor(Monitor):
    """The size of each weight.

    | key | meaning | unit | cost |
    |---|---|---|---|
    | `muon/weight_rms/<name>` | `√mean(w²)` | of the weight | a pass over the weights |
    | `muon/weight_spectral_norm/<name>` | largest singular value | of the weight | `orthogonalize.spectral_norm` |

    Every parameter (its matrices, for the spectral norm), every ``log_every_n_steps`` steps. Under weight decay both
    should level off; without it they grow (Moonlight, arXiv 2502.16982, §2.2). Alarm: a spectral norm above what weight
    decay and the size of the updates allow.
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
    def show(self, trainer: pl.Trainer, logger: Logger, collection: Collection) -> None:
        if isinstance(logger, TensorBoardLogger):
            for name, sigma in collection.spectra.items():
                if self.request.wants(name):
                    tag = f"muon/weight_singular_values/{name}"
                    logger.experiment.add_histogram(tag, sigma.numpy(), trainer.global_step)


class MomentumSpectrumMonitor(Monitor):
    """What Newton–Schulz is given, and what it makes of it.

    N is the matrix that is orthogonalised, ``(1-μ)G + μM`` with Nesterov; σ are the singular values of
    ``N/‖N‖_F``, descending, r of them; f(σ) is where the polynomial sequence that was applied takes them, in exact
    arithmetic.

    | key | meaning | range |
    |---|---|---|
    | `muon/momentum_q10/<name>`, q25, q50, q75, q90, q95 | σ at rank `⌈q·r⌉`: q10 is large, q95 small | 0 … 1 |
    | `muon/momentum_scaled_q10/<name>`, q25, q50, q75, q90 | the same times √r | 0 … √r |
    | `muon/momentum_participation_rank/<name>` | `(Σσ²)²/Σσ⁴` | 1 … r |
    | `muon/momentum_nuclear_rank/<name>` | `(Σσ)²/Σσ²` | 1 … r |
    | `muon/momentum_spike/<name>` | `σ₁²` | 1/r … 1 |
    | `muon/ns_fail_frac/<name>` | share of the σ with f(σ) < 0.1 | 0 … 1 |
    | `muon/ns_descent_kept/<name>` | `Σσf(σ)/Σσ`: descent along N, in units of the exact polar factor's | about 1 |
    | `muon/ns_orthogonality_error/<name>` | `√mean((f(σ)²-1)²)` | 0 … |
    | `muon/ns_residual/<name>` | `‖XXᵀ-I‖_F/√r` before the last step, as computed | 0 … |
    | `muon/ns_steps/<name>` | number of steps; `orthogonalization="auto"` changes it | |
    | `muon/gradient_momentum_cosine/<name>` | of the gradient and the momentum after the step | -1 … 1 |
    | `muon/update_gradient_cosine/<name>` | of the update and the gradient; above 0 is descent | -1 … 1 |
    | `muon/momentum_singular_values/<name>` | histogram of log₁₀ σ (TensorBoard only) | -8 … 0 |

    The parameters that Muon trains, every 200 steps; of a parameter of several matrices, those that took part in the
    step. The step is told before (``Muon.watch_next_step``), and the owner of a matrix computes its σ on the way:
    `eigvalsh(NNᵀ)` in float64. A step that is skipped logs none of these keys. Training is the same with and
    without. Alarms: the median σ fails; a matrix with a gradient of zeros moves.

    When training starts, process 0 writes ``muon_model.json`` beside the logs (into ``default_root_dir`` if no logger
    has a folder): the size of the model and its matrices, which ``lightning-muon advise`` and ``fit`` need.
    """

    families: ClassVar[tuple[str, ...]] = (
        *(f"momentum_q{percent}" for percent in (10, 25, 50, 75, 90, 95)),
        *(f"momentum_scaled_q{percent}" for percent in (10, 25, 50, 75, 90)),
        "momentum_participation_rank",
        "momentum_nuclear_rank",
        "momentum_spike",
        "ns_fail_frac",
        "ns_descent_kept",
        "ns_orthogonality_error",
        "ns_residual",
        "ns_steps",
        "gradient_momentum_cosine",
        "update_gradient_cosine",
    )
    needs_muon = True

    @override
    def default_interval(self, trainer: pl.Trainer) -> int:
        return 200

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            description = describe_model(trainer.optimizers, parameter_names(pl_module))
            for folder in log_folders(trainer.loggers) or [Path(trainer.default_root_dir)]:
                Loggers().attempt(
                    f"The writer of muon_model.json in {folder}", trainer.global_step, description.write, folder
                )

    @override
    def show(self, trainer: pl.Trainer, logger: Logger, collection: Collection) -> None:
        if isinstance(logger, TensorBoardLogger):
            for name, sigma in collection.momentum_spectra.items():
                if self.request.wants(name) and (sigma > 0).any():
                    # by decades: on a linear axis all but the largest are one bar at 0
                    logs = sigma[sigma > 0].log10().clamp(max=0).numpy()  # 1, but for rounding
                    tag = f"muon/momentum_singular_values/{name}"
                    logger.experiment.add_histogram(tag, logs, trainer.global_step, bins=_LOG10_EDGES)
