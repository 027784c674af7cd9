"""A heat map of layers × time as pixels, drawn by matplotlib without a window or global state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lightning_muon.logs.rows import Row
from lightning_muon.reporting.catalogue import Quantity
from lightning_muon.reporting.grid import Grid, color_limits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

__all__ = ["heat_map_image"]

_ROW_INCHES, _DPI = 0.155, 100
# Margins by hand: a layout that looks for them draws everything several times.
_MAP_INCHES, _BAR_INCHES, _RIGHT_INCHES, _TOP_INCHES, _BOTTOM_INCHES = 6.0, 0.14, 0.65, 0.3, 0.45
_GAP_INCHES, _LETTER_INCHES, _LABEL_MARGIN_INCHES = 0.12, 0.063, 0.15
_BAD_COLORS = ("#f3f1ec", "#f6c89a", "#e8804d", "#c23a3a", "#6d0f2e")
_COLORMAPS = {"linear": "viridis", "log": "viridis", "signed": "RdBu"}


def heat_map_image(quantity: Quantity, rows: Sequence[Row], grid: Grid) -> NDArray[np.uint8]:
    """Draw it.

    Args:
        quantity: What is drawn; it decides on the colours.
        rows: The layers from top to bottom, one or more.
        grid: Their values.

    Returns:
        ``(height, width, 3)``, red, green and blue from 0 to 255.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    left = _LABEL_MARGIN_INCHES + _LETTER_INCHES * max(len(row.label) for row in rows)
    width = left + _MAP_INCHES + _GAP_INCHES + _BAR_INCHES + _RIGHT_INCHES
    inner = _ROW_INCHES * max(len(rows), 3)
    height = inner + _TOP_INCHES + _BOTTOM_INCHES
    figure = Figure(figsize=(width, height), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    bottom, tall = _BOTTOM_INCHES / height, inner / height
    axes = figure.add_axes((left / width, bottom, _MAP_INCHES / width, tall))
    bar_axes = figure.add_axes(((left + _MAP_INCHES + _GAP_INCHES) / width, bottom, _BAR_INCHES / width, tall))
    bad = LinearSegmentedColormap.from_list("bad", _BAD_COLORS)
    values = np.ma.masked_invalid(grid.values)
    if quantity.scale == "log":
        values = np.ma.masked_less_equal(values, 0)
    mesh = axes.pcolormesh(
        _edges(grid.steps),
        np.arange(len(rows) + 1),
        values,
        cmap=bad if quantity.is_bad_high else _COLORMAPS[quantity.scale],
        norm=_norm(quantity, values.filled(np.nan)),
        rasterized=True,
    )
    axes.set_facecolor("#dddddd")  # nothing was logged
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(rows)) + 0.5, [row.label for row in rows], fontsize=7, parse_math=False)
    axes.tick_params(axis="y", length=2)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.set_title(quantity.title, fontsize=10, loc="left")
    _draw_separators(axes, rows)
    bar = figure.colorbar(mesh, cax=bar_axes)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = canvas.buffer_rgba()  # type: ignore[no-untyped-call]
    return np.asarray(pixels, dtype=np.uint8)[..., :3].copy()


def _edges(steps: Sequence[int]) -> NDArray[np.float64]:
    """Between the steps, and as far outside of the first and the last."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (np.array(steps[1:], dtype=float) + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])


def _norm(quantity: Quantity, values: NDArray[np.float64]) -> Normalize:
    from matplotlib.colors import LogNorm, Normalize

    low, high = quantity.limits or color_limits(values)
    if quantity.scale != "log":
        return Normalize(min(low, 0.0) if quantity.is_bad_high else low, high)
    positive = values[np.isfinite(values)]
    low, high = (max(low, positive.min()), high) if len(positive) else (0.1, 1.0)
    return LogNorm(low, high)


def _draw_separators(axes: Axes, rows: Sequence[Row]) -> None:
    for place in range(1, len(rows)):
        if rows[place].type != rows[place - 1].type:
            axes.axhline(place, color="#8a8a8a", linewidth=0.6)
