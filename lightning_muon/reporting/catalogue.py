"""What is drawn as layer × time: the logged quantity, its scale, and what to look for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["QUANTITIES", "Quantity", "Scale"]

Scale = Literal["linear", "log", "signed"]


@dataclass(frozen=True)
class Quantity:
    """A logged quantity of every layer.

    Attributes:
        family: What its keys start with, up to the name of the parameter or module.
        title: A few words.
        section: Where it stands in the report.
        caption: What it is, and what to look for.
        logged_by: What to add to a training to have it; empty where that depends on the model.
        scale: Of the colours; ``"signed"`` is from -1 to 1, with a neutral middle.
        limits: Of the colours, where they do not depend on the run.
        is_of_matrices: Whether its layers are parameters, of which only matrices are drawn; else modules or others.
        is_bad_high: Whether large values are trouble; they are red then.
        is_constant_left_out: Whether there is nothing to see where all values are the same.
        in_tensorboard: Whether it is drawn during training too.
    """

    family: str
    title: str
    section: str
    caption: str
    logged_by: str = "MomentumSpectrumMonitor"
    scale: Scale = "linear"
    limits: tuple[float, float] | None = None
    is_of_matrices: bool = True
    is_bad_high: bool = False
    is_constant_left_out: bool = False
    in_tensorboard: bool = False


QUANTITIES = (
    Quantity(
        "muon/update_rms",
        "Update RMS",
        "Updates",
        '√mean(u²) of W ← W - lr·(u + λW). With scale="match_rms_adamw" Muon\'s matrices should sit near 0.2, all of'
        " them and all the time: a dark row is a layer whose momentum has a low rank or whose small directions the"
        " polynomials do not lift. Matrices that AdamW trains move about more.",
        "UpdateRMSMonitor",
        in_tensorboard=True,
    ),
    Quantity(
        "muon/update_weight_ratio",
        "Update over weight",
        "Updates",
        "‖ΔW‖/‖W‖ of one step. Rows that stand out learn faster or slower than their neighbours. It follows the"
        " learning rate's schedule, and falls as weights grow.",
        "UpdateRMSMonitor",
        "log",
        in_tensorboard=True,
    ),
    Quantity(
        "muon/gradient_momentum_cosine",
        "Cosine of gradient and momentum",
        "Updates",
        "Whether this step's gradient points where the running average does. Near 0, the gradients of different steps"
        " have little in common; below 0 they turn around.",
        scale="signed",
        limits=(-1, 1),
        in_tensorboard=True,
    ),
    Quantity(
        "muon/update_gradient_cosine",
        "Cosine of update and gradient",
        "Updates",
        "Above 0, the update descends on this step's batch. Muon's is small where few directions have the energy, since"
        " it moves all directions alike.",
        scale="signed",
        limits=(-1, 1),
        in_tensorboard=True,
    ),
    Quantity(
        "muon/weight_svd_entropy",
        "SVD entropy of the weights",
        "Weights",
        "-Σ p ln p / ln n with p = σ²/Σσ²: 1 if all singular values are equal, 0 for rank one. Muon should keep it"
        " above AdamW's. A row that darkens with time collapses to few directions.",
        "SpectrumMonitor",
        in_tensorboard=True,
    ),
    Quantity(
        "muon/weight_stable_rank",
        "Stable rank of the weights",
        "Weights",
        "‖W‖_F²/σ₁²: how many directions weigh as much as the largest. It falls where one singular value runs away.",
        "SpectrumMonitor",
        "log",
    ),
    Quantity(
        "muon/momentum_q50",
        "Median singular value of the momentum",
        "Momentum",
        "σ at the middle of the spectrum of what is orthogonalised, relative to its Frobenius norm. The lower, the"
        " further a polynomial sequence has to reach; wide matrices start lower.",
        scale="log",
        in_tensorboard=True,
    ),
    Quantity(
        "muon/momentum_scaled_q50",
        "The same times √r",
        "Momentum",
        "σ·√r, r the matrix's shorter side: what is left when width is taken out. A square matrix of noise has 0.81,"
        " an elongated one up to 1; far below, the momentum has structure and its small directions are weak.",
        scale="log",
    ),
    Quantity(
        "muon/momentum_participation_rank",
        "Participation rank of the momentum",
        "Momentum",
        "(Σσ²)²/Σσ⁴: how many directions hold the energy.",
        scale="log",
    ),
    Quantity(
        "muon/momentum_nuclear_rank",
        "Nuclear rank of the momentum",
        "Momentum",
        "(Σσ)²/Σσ²: how many directions share the descent.",
        scale="log",
    ),
    Quantity(
        "muon/ns_fail_frac",
        "Directions that Newton–Schulz misses",
        "Newton–Schulz",
        "Share of the singular values with f(σ) < 0.1: directions that are all but missing from the update. Red rows"
        " want more steps, or a sequence made for smaller σ: lightning-muon advise says which.",
        limits=(0, 0.5),
        is_bad_high=True,
        in_tensorboard=True,
    ),
    Quantity(
        "muon/ns_descent_kept",
        "Descent kept",
        "Newton–Schulz",
        "Σσf(σ)/Σσ: ⟨update, momentum⟩ in units of the exact polar factor's. About 1 is all of it, and little is lost"
        " by missing directions that are small.",
        limits=(0.7, 1.2),
    ),
    Quantity(
        "muon/ns_orthogonality_error",
        "Orthogonality error",
        "Newton–Schulz",
        "‖OOᵀ-I‖_F/√r of the orthogonalised momentum O: 0 if its singular values are all 1. Missing directions count"
        " too, so a momentum of low rank has a large error.",
        is_bad_high=True,
        in_tensorboard=True,
    ),
    Quantity(
        "muon/ns_steps",
        "Steps of the iteration",
        "Newton–Schulz",
        'How many steps orthogonalization="auto" takes. Layers with small singular values take more.',
        is_constant_left_out=True,
    ),
    Quantity(
        "attention/max_logit",
        "Largest attention logit",
        "Attention",
        "Before the softmax, of the head with the largest. Kimi K2's authors saw them grow beyond 1,000 with Muon, and"
        " cap them at 100 (QK-Clip).",
        "QKClip",
        "log",
        is_bad_high=True,
        in_tensorboard=True,
        is_of_matrices=False,
    ),
    Quantity(
        "moe/max_vio",
        "MaxVio of the experts' load",
        "Mixture of experts",
        "(Largest load - mean load)/mean load: 0 is balanced. It should fall as the balancing takes hold.",
        "ExpertLoadMonitor",
        is_bad_high=True,
        in_tensorboard=True,
        is_of_matrices=False,
    ),
    Quantity(
        "moe/dead_experts",
        "Dead experts",
        "Mixture of experts",
        "Experts without a token. One that stays dead learns nothing.",
        "ExpertLoadMonitor",
        is_bad_high=True,
        in_tensorboard=True,
        is_of_matrices=False,
    ),
    Quantity(
        "moe/load_entropy",
        "Entropy of the load",
        "Mixture of experts",
        "1 if all experts get the same share of the tokens.",
        "ExpertLoadMonitor",
        is_of_matrices=False,
    ),
    Quantity(
        "moe/router_entropy",
        "Entropy of the router",
        "Mixture of experts",
        "Of the probabilities for one token: it falls as the router makes up its mind.",
        "ExpertLoadMonitor",
        is_of_matrices=False,
    ),
)
