"""Layers × time, side by side for the runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_muon.logs import Series
from lightning_muon.logs.rows import Row, arrange
from lightning_muon.reporting.catalogue import Quantity
from lightning_muon.reporting.chart import (
    GRAY,
    Chart,
    Figure,
    Variant,
    axis_title,
    base_layout,
    packed,
    panel_title,
    text,
)
from lightning_muon.reporting.grid import Grid, color_limits, grid
from lightning_muon.reporting.runs import Run

__all__ = ["heat_map"]

_MOST_IN_A_ROW = 3
_ALL_COLUMNS, _FEWEST_COLUMNS = 300, 80
_ROW_PIXELS, _TOP, _BOTTOM, _LABELS = 15, 34, 52, 8
# As matplotlib's RdBu, which the pictures for TensorBoard have; plotly's own of that name is the other way round.
_SIGNED_SCALE = [[0, "#67001f"], [0.25, "#d6604d"], [0.5, "#f7f7f7"], [0.75, "#4393c3"], [1, "#053061"]]
_SCALES = {"linear": "Viridis", "log": "Viridis", "signed": _SIGNED_SCALE}
_BAD_SCALE = [[0, "#f3f1ec"], [0.25, "#f6c89a"], [0.5, "#e8804d"], [0.75, "#c23a3a"], [1, "#6d0f2e"]]


def heat_map(quantity: Quantity, runs: Sequence[Run], max_rows: int) -> Chart | None:
    """Draw a quantity of every layer over time.

    Args:
        quantity: Which.
        runs: All of the report; those that logged it get a panel each, on the same colours.
        max_rows: Of more layers, some are shown.

    Returns:
        The chart; ``None`` if no run logged it.
    """
    found = {run: families for run in runs if (families := _of_matrices(quantity, run, runs))}
    if not found or (quantity.is_constant_left_out and _is_constant(found.values())):
        return None
    names = list(dict.fromkeys(name for series in found.values() for name in series))
    rows = arrange(names, max_rows)
    columns = max(_FEWEST_COLUMNS, _ALL_COLUMNS // min(len(found), _MOST_IN_A_ROW))
    grids = {run.label: grid([series.get(row.name, {}) for row in rows], columns) for run, series in found.items()}
    notes = _notes(len(names), len(rows), grids, len(runs) - len(found))
    figure = _figure(quantity, rows, grids, has_titles=len(runs) > 1)
    return Chart(quantity.title, quantity.section, quantity.caption, (Variant("", "", figure),), notes)


def _of_matrices(quantity: Quantity, run: Run, runs: Sequence[Run]) -> Mapping[str, Series]:
    """Without vectors, as far as it is known which parameters are matrices."""
    series = run.family(quantity.family)
    matrices = frozenset[str]().union(*(one.matrices for one in runs))
    if not quantity.is_of_matrices or not matrices:
        return series
    return {name: one for name, one in series.items() if name in matrices}


def _is_constant(found: Iterable[Mapping[str, Series]]) -> bool:
    return len({value for of_run in found for series in of_run.values() for value in series.values()}) == 1


def _notes(layers: int, rows: int, grids: Mapping[str, Grid], without: int) -> list[str]:
    notes = []
    if rows < layers:
        notes.append(f"{rows} of {layers} layers are shown, spread over the depth; --include, --exclude choose others.")
    thinned = [one for one in grids.values() if len(one.steps) < one.logged_steps]
    if thinned:
        kept = max(len(one.steps) for one in thinned)
        notes.append(f"Thinned to {kept} of {max(one.logged_steps for one in thinned)} logged steps.")
    if without:
        notes.append(f"{without} of the runs did not log it.")
    return notes


def _figure(quantity: Quantity, rows: Sequence[Row], grids: Mapping[str, Grid], has_titles: bool) -> Figure:
    across = min(len(grids), _MOST_IN_A_ROW)
    down = -(-len(grids) // across)
    panel = len(rows) * _ROW_PIXELS
    height = down * (panel + _TOP + _BOTTOM) - (_BOTTOM - 40)
    layout = base_layout(height, margin={"l": _LABELS, "r": 10, "t": _TOP if has_titles else 12, "b": 40})
    layout["annotations"] = []
    layout["shapes"] = []
    inner = height - layout["margin"]["t"] - 40
    data = []
    names = [text(row.name) for row in rows]
    for number, (label, one) in enumerate(grids.items()):
        down_to, place = divmod(number, across)
        suffix = str(number + 1) if number else ""
        left, right = (place + 0.03 * bool(place)) / across, (place + 1) / across
        top = 1 - down_to * (panel + _TOP + _BOTTOM) / inner
        data.append(_trace(quantity, one, names, suffix))
        layout[f"xaxis{suffix}"] = {
            "domain": [left, right],
            "anchor": f"y{suffix}",
            "title": axis_title("optimizer step"),
            "showgrid": False,
            "zeroline": False,
            "ticks": "outside",
        }
        layout[f"yaxis{suffix}"] = {
            "domain": [top - panel / inner, top],
            "anchor": f"x{suffix}",
            "type": "category",
            "autorange": "reversed",
            "tickmode": "array",
            "tickvals": names,
            "ticktext": [text(row.label) for row in rows],
            "tickfont": {"size": 11},
            "showgrid": False,
            "zeroline": False,
            "automargin": "left" if not place else False,
            "showticklabels": not place,
        }
        if number:
            layout[f"yaxis{suffix}"]["matches"] = "y"
        if has_titles:
            layout["annotations"].append(panel_title(label, left, top, font={"size": 13}))
        layout["shapes"] += _separators(rows, suffix)
    layout["coloraxis"] = _colors(quantity, np.concatenate([one.values.ravel() for one in grids.values()]), panel)
    return {"data": data, "layout": layout}


def _trace(quantity: Quantity, one: Grid, names: Sequence[str], suffix: str) -> dict[str, Any]:
    values = np.where(np.isfinite(one.values), one.values, np.nan)
    trace = {
        "type": "heatmap",
        "x": list(one.steps),
        "y": list(names),
        "coloraxis": "coloraxis",
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
        "hoverongaps": False,
        "hovertemplate": "%{y}<br>step %{x}: <b>%{z:.4g}</b><extra></extra>",
        "z": packed(values),
    }
    if quantity.scale == "log":
        trace |= {
            "z": packed(_logarithm(values)),
            "customdata": packed(values),
            "hovertemplate": "%{y}<br>step %{x}: <b>%{customdata:.4g}</b><extra></extra>",
        }
    return trace


def _logarithm(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log10(values, out=np.full_like(values, np.nan), where=values > 0)


def _colors(quantity: Quantity, values: NDArray[np.float64], panel: int) -> dict[str, Any]:
    is_log = quantity.scale == "log"
    low, high = quantity.limits or color_limits(_logarithm(values) if is_log else values)
    if quantity.is_bad_high and quantity.limits is None and not is_log:
        low = min(low, 0.0)
    bar: dict[str, Any] = {"thickness": 12, "outlinewidth": 0, "len": max(panel, 90), "lenmode": "pixels"}
    if is_log:
        ticks = _log_ticks(low, high)
        bar |= {"tickvals": [float(np.log10(tick)) for tick in ticks], "ticktext": [f"{tick:g}" for tick in ticks]}
    return {
        "colorscale": _BAD_SCALE if quantity.is_bad_high else _SCALES[quantity.scale],
        "cmin": low,
        "cmax": high,
        "colorbar": {**bar, "y": 1, "yanchor": "top", "ypad": 0, "xpad": 8},
    }


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two powers of ten, few but at least two where there are any."""
    exponents = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [float(f"{mantissa}e{n}") for n in exponents for mantissa in mantissas]
        ticks = [tick for tick in ticks if low <= np.log10(tick) <= high]
        if len(ticks) >= 3:
            break
    return ticks or [float(f"{10**low:.3g}"), float(f"{10**high:.3g}")]


def _separators(rows: Sequence[Row], suffix: str) -> list[dict[str, Any]]:
    """Between layer types."""
    starts = [place for place in range(1, len(rows)) if rows[place].type != rows[place - 1].type]
    line = {"color": GRAY, "width": 1}
    place = {"type": "line", "xref": f"x{suffix} domain", "yref": f"y{suffix}", "x0": 0, "x1": 1, "line": line}
    return [{**place, "y0": start - 0.5, "y1": start - 0.5} for start in starts]
