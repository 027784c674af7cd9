"""How much compute one optimizer needs for the loss that another reaches, from power laws. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np

_RESAMPLES = 2000

Losses = Mapping[int, Mapping[int, float]]  # by size and seed


def equal_loss_ratio(c: float, muon: tuple[float, float], adamw: tuple[float, float]) -> float:
    """``C_Muon / C`` where Muon's law has the loss that AdamW's has at ``C``; laws are ``(c, α)`` of ``c · C^-α``."""
    log_loss = math.log(adamw[0]) - adamw[1] * math.log(c)
    return math.exp((math.log(muon[0]) - log_loss) / muon[1] - math.log(c))


def published_ratio(c: float) -> float:
    """What Moonlight's printed fits (arXiv 2502.16982, fig. 3) give at AdamW's ``c`` PFLOP/s-days."""
    return equal_loss_ratio(c, (2.506, 0.052), (2.608, 0.054))


def interpolated_ratio(compute: float, loss: float, muon: Mapping[float, float]) -> float | None:
    """The same without a law: between two of Muon's runs, in logarithms of compute and loss.

    Args:
        compute: AdamW's.
        loss: That it reaches with it.
        muon: Muon's mean loss by its compute.

    Returns:
        ``C_Muon / C``; ``None`` if no two neighbours have the loss between them.
    """
    for (less, above), (more, below) in itertools.pairwise(sorted(muon.items())):
        if below <= loss <= above:
            part = math.log(above / loss) / math.log(above / below)
            return math.exp(math.log(less) + part * math.log(more / less) - math.log(compute))
    return None


def compute_ratios(
    muon_sizes: Mapping[int, float], adamw_sizes: Mapping[int, float], muon: Losses, adamw: Losses
) -> dict[int, dict[str, float]]:
    """The ratio at AdamW's compute of every size, with an interval of 95 %.

    The interval is a percentile bootstrap over the seeds: both optimizers' losses of a seed go together, as they share
    weights, but for their scale, and text; each size draws its own. It holds the scatter of seeds, not what a law
    leaves out; with as few seeds as five it is too narrow.

    Args:
        muon_sizes: Muon's compute by size.
        adamw_sizes: AdamW's.
        muon: Losses by size and seed; sizes without losses are left out.
        adamw: The same sizes and seeds.

    Returns:
        ``ratio``, ``low`` and ``high`` by size.
    """
    widths, seeds = sorted(muon), sorted(next(iter(muon.values())))
    x_muon, x_adamw = (np.log([sizes[width] for width in widths]) for sizes in (muon_sizes, adamw_sizes))
    y_muon, y_adamw = (np.log([[losses[w][s] for s in seeds] for w in widths]) for losses in (muon, adamw))
    generator = np.random.default_rng(0)
    shape, row = (_RESAMPLES, len(widths), len(seeds)), np.arange(len(widths))[:, None]
    laws = [
        (_law(x_muon, y_muon[row, chosen].mean(1)), _law(x_adamw, y_adamw[row, chosen].mean(1)))
        for chosen in generator.integers(len(seeds), size=shape)
    ]
    whole = _law(x_muon, y_muon.mean(1)), _law(x_adamw, y_adamw.mean(1))
    found = {}
    for width in widths:
        resampled = [equal_loss_ratio(adamw_sizes[width], *pair) for pair in laws]
        low, high = np.quantile(resampled, [0.025, 0.975])
        found[width] = {"ratio": equal_loss_ratio(adamw_sizes[width], *whole), "low": float(low), "high": float(high)}
    return found


def _law(log_c: np.typing.NDArray[np.float64], log_loss: np.typing.NDArray[np.float64]) -> tuple[float, float]:
    slope, intercept = np.polyfit(log_c, log_loss, 1)
    return math.exp(intercept), -float(slope)
