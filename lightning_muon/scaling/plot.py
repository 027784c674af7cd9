"""The laws of a ladder as a picture: a panel per layer type, a line per depth."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_muon.scaling.depths import DEPTHS, NO_DEPTH
from lightning_muon.scaling.report import Fit, Target, short_names
from lightning_muon.scaling.sequences import resolution_limit
from lightning_muon.usage import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot"]

# Okabe and Ito's, which colour-blind readers can tell apart; early depths are blue, the final one is red.
_COLORS = dict(zip((*DEPTHS, NO_DEPTH), ("#56B4E9", "#0072B2", "#009E73", "#D55E00", "#555555"), strict=True))
_MARKERS = dict(zip((*DEPTHS, NO_DEPTH), "os^Dv", strict=True))
# Side by side where they would hide each other: factors on the size.
_SHIFTS = dict(zip((*DEPTHS, NO_DEPTH), (0.94, 0.98, 1.02, 1.06, 1.0), strict=True))
_REFERENCE = "polar_express5"
_FORMATS = (".png", ".pdf", ".svg")
_POINTS_OF_LINE = 60
_MARGIN = 1.15
_PANEL_INCHES = (3.9, 3.4)
_FOOTER = (
    "±: 95 % for the exponent. Bands: 95 % for one more run. Dashed: extrapolated. Points of one size are spread"
    " sideways by depth so that they can be told apart."
)
_FOOTER_POINTS, _FOOTER_CHARACTERS_PER_INCH, _POINTS_PER_INCH = 7, 19, 72


def plot(fits: Sequence[Fit], quantile: str, target: Target | None, suffix: str = ".png") -> bytes:
    """Draw σ over size, both on log scales: points, the plain laws with bands for one run, extrapolations dashed.

    Args:
        fits: The laws.
        quantile: Which quantile σ is, for the axis.
        target: Where to extrapolate to; ``None`` ends the lines at the largest size.
        suffix: ``".png"``, ``".pdf"`` or ``".svg"``.

    Returns:
        The content of a file of that format.

    Raises:
        UsageError: matplotlib is not installed, or the format is another.
    """
    if suffix not in _FORMATS:
        raise UsageError(f"a plot is a file {', '.join(_FORMATS)}; got {suffix!r}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plots need matplotlib: pip install 'lightning-muon[scaling]'") from None
    types = list(dict.fromkeys(fit.place.type for fit in fits))
    titles = short_names(types)
    columns = min(4, math.ceil(math.sqrt(len(types))))
    rows = math.ceil(len(types) / columns)
    width, height = _PANEL_INCHES
    footer = textwrap.wrap(_FOOTER, int(columns * width * _FOOTER_CHARACTERS_PER_INCH))
    footer_height = 1.4 * _FOOTER_POINTS * (len(footer) + 1) / _POINTS_PER_INCH
    figure_height = rows * height + 0.3 + footer_height
    figure = Figure(figsize=(columns * width, figure_height), layout="constrained")
    share = footer_height / figure_height
    figure.get_layout_engine().set(rect=(0, share, 1, 1 - share))  # type: ignore[call-arg, union-attr]
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for number, (axes, type_) in enumerate(zip(panels, types, strict=False)):
        for fit in fits:
            if fit.place.type == type_:
                _draw(axes, fit, target)
        axes.set_title(titles[type_], fontsize=10)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7.5, framealpha=0.75, edgecolor="none", loc="best")
        is_lowest = number + columns >= len(types)
        axes.tick_params(labelbottom=is_lowest)
        axes.set_xlabel("trained parameters" if is_lowest else "")
    for axes in panels[len(types) :]:
        axes.set_axis_off()
    for axes in panels[: len(types)]:  # now that the range is known, which the limit must not widen
        _draw_limit(axes)
        if target:
            _draw_target(axes, target)
    figure.text(0.01, 0.01, "\n".join(footer), fontsize=_FOOTER_POINTS, color="#777777", va="bottom")
    figure.supylabel(rf"$\sigma_{{\mathrm{{{quantile}}}}}$ of the normalised momentum", fontsize=11)
    file = io.BytesIO()
    figure.savefig(file, format=suffix.removeprefix("."), dpi=150)
    return file.getvalue()


def _draw(axes: Axes, fit: Fit, target: Target | None) -> None:
    law, depth = fit.plain, fit.place.depth
    color = _COLORS[depth]
    smallest, largest = law.sizes[0], law.sizes[-1]
    half = law.exponent.high - law.exponent.value
    label = "" if depth == NO_DEPTH else f"{depth}: "
    label += rf"$\alpha = {law.exponent.value:.2f}" + (rf" \pm {half:.2f}$" if half < math.inf else "$")
    label += ", curved" if law.is_curved else ""
    sizes = [size * _SHIFTS[depth] for size in law.sizes]
    style = {"color": color, "markerfacecolor": "none", "markersize": 4.5, "markeredgewidth": 1.1}
    axes.loglog(sizes, law.values, _MARKERS[depth], label=label, zorder=3, **style)
    _line(axes, fit, smallest / _MARGIN, largest * _MARGIN, color, "-", 0.18)
    if target and target.size > largest * _MARGIN:
        _line(axes, fit, largest * _MARGIN, target.size, color, "--", 0.08)
    elif target and target.size < smallest / _MARGIN:
        _line(axes, fit, target.size, smallest / _MARGIN, color, "--", 0.08)


def _line(axes: Axes, fit: Fit, start: float, stop: float, color: str, style: str, alpha: float) -> None:
    sizes = [start * (stop / start) ** (number / (_POINTS_OF_LINE - 1)) for number in range(_POINTS_OF_LINE)]
    predicted = [fit.plain.predict(size) for size in sizes]
    axes.plot(sizes, [min(one.value, 1.0) for one in predicted], style, color=color, linewidth=1.4)
    if all(one.low > 0 and one.high < math.inf for one in predicted):
        low, high = [min(one.low, 1.0) for one in predicted], [min(one.high, 1.0) for one in predicted]
        axes.fill_between(sizes, low, high, color=color, alpha=alpha, linewidth=0)


def _draw_limit(axes: Axes) -> None:
    limit = resolution_limit(_REFERENCE)
    low, high = axes.get_ylim()
    if low < limit < high:
        axes.axhline(limit, color="#999999", linestyle=":", linewidth=1)
        text = f" {_REFERENCE} resolves what is above"
        axes.text(0, limit, text, transform=axes.get_yaxis_transform(), fontsize=7, color="#777777", va="top")


def _draw_target(axes: Axes, target: Target) -> None:
    axes.axvline(target.size, color="#999999", linestyle="-.", linewidth=1)
    style = {"fontsize": 7, "color": "#777777", "rotation": 90, "ha": "right", "va": "bottom"}
    axes.text(target.size, 0.02, "target", transform=axes.get_xaxis_transform(), **style)  # type: ignore[arg-type]
