"""How the experiments' pictures look."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MUON, ADAMW, OTHER, THIRD = "#1f5fa8", "#d1702a", "#8a8a8a", "#3b8f5a"


@contextmanager
def panels(path: Path, columns: int, width: float = 5.0) -> Iterator[list[Axes]]:
    """Axes side by side, saved when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(1, columns, figsize=(width * columns, 4.0), layout="constrained", squeeze=False)
    try:
        yield list(grid[0])
        figure.savefig(path, dpi=130)
    finally:
        plt.close(figure)


def frame(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Names the axes."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10)


def log_losses(axes: Axes) -> None:
    """A logarithmic axis of losses, which are within a decade: plain numbers, and not powers of ten."""
    from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def with_seeds(axes: Axes, x: list[float], by_seed: list[list[float]], **style: Any) -> None:
    """The mean as a line, every seed as a small point."""
    for values in by_seed:
        axes.plot(x, values, linestyle="", marker=".", markersize=4, alpha=0.5, color=style["color"])
    means = [sum(values) / len(values) for values in zip(*by_seed, strict=True)]
    axes.plot(x, means, **{"linewidth": 1.8, "marker": "o", "markersize": 5, **style})
