"""Curves over time: of whole runs, and of layer types in small panels."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lightning_muon.logs import Series, layers
from lightning_muon.logs.rows import short_types
from lightning_muon.reporting.chart import (
    COLORS,
    Chart,
    Figure,
    Variant,
    axis_title,
    base_layout,
    packed,
    panel_title,
    text,
)
from lightning_muon.reporting.grid import grid, thin
from lightning_muon.reporting.runs import Run

__all__ = ["curves", "panels_by_type"]

_POINTS, _POINTS_OF_PANEL = 600, 150
_DASHES = ("solid", "dot", "dash", "longdash")
_ACROSS, _PANEL_HEIGHT, _TITLE_HEIGHT = 4, 120, 44
_MOST_PANELS = 32


def curves(title: str, section: str, caption: str, runs: Sequence[Run], pattern: str, y_title: str) -> Chart | None:
    """The scalars whose key matches: a colour for each run, a dash for each key.

    Args:
        title: Of the chart.
        section: Where it stands.
        caption: What to look for.
        runs: All of the report.
        pattern: Regular expression, searched for in the key.
        y_title: Of the axis.

    Returns:
        The chart; ``None`` if no run has such a key.
    """
    found = [(number, run, _distinct(run, pattern)) for number, run in enumerate(runs)]
    keys = list(dict.fromkeys(key for _, _, series in found for key in series))
    if not keys:
        return None
    data = []
    for number, run, series in found:
        for key, one in series.items():
            steps, values = thin(one, _POINTS)
            dash = _DASHES[keys.index(key) % len(_DASHES)]
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if len(steps) <= 20 else "lines",
                    "name": text(f"{run.label} · {key}" if len(runs) > 1 else key),
                    "x": steps,
                    "y": packed(values),
                    "line": {"color": COLORS[number % len(COLORS)], "dash": dash, "width": 1.6},
                    "hovertemplate": "%{y:.5g}",
                }
            )
    layout = base_layout(
        350,
        margin={"l": 60, "r": 20, "t": 44, "b": 44},
        xaxis={"title": axis_title("optimizer step"), "zeroline": False},
        yaxis={"title": axis_title(y_title), "zeroline": False},
        hovermode="x unified",
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    return Chart(title, section, caption, (Variant("", "", {"data": data, "layout": layout}),))


def _distinct(run: Run, pattern: str) -> dict[str, Series]:
    """Without those that repeat another under a second name, as ``val_loss`` does ``val/loss``, or are all 0."""
    found: dict[str, Series] = {}
    for key, series in run.scalars.items():
        if re.search(pattern, key) and series not in found.values() and any(series.values()):
            found[key] = series
    return found


def panels_by_type(title: str, section: str, caption: str, runs: Sequence[Run], family: str) -> Chart | None:
    """A small panel for each layer type: the median over the blocks, in the band from the smallest to the largest.

    Returns:
        The chart; ``None`` if no run logged the family.
    """
    by_run = {run: run.family(family) for run in runs}
    layer_of = layers(list(dict.fromkeys(name for series in by_run.values() for name in series)))
    matrices = frozenset[str]().union(*(run.matrices for run in runs))
    names = [name for name in layer_of if not matrices or name in matrices]
    if not names:
        return None
    types = short_types(layer_of[name] for name in names)
    shown = dict(list(types.items())[:_MOST_PANELS])
    by_type: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_type[layer_of[name].type].append(name)
    members = {types[type_]: by_type[type_] for type_ in shown}
    notes = [f"{len(shown)} of {len(types)} layer types are shown."] if len(shown) < len(types) else []
    figure = _small_multiples(members, by_run, len(runs) > 1)
    return Chart(title, section, caption, (Variant("", "", figure),), notes)


def _small_multiples(
    members: Mapping[str, Sequence[str]], by_run: Mapping[Run, Mapping[str, Series]], has_legend: bool
) -> Figure:
    across = min(_ACROSS, len(members))
    down = -(-len(members) // across)
    inner = down * (_PANEL_HEIGHT + _TITLE_HEIGHT)
    top_margin = 34 if has_legend else 6
    layout = base_layout(inner + top_margin + 16, margin={"l": 48, "r": 10, "t": top_margin, "b": 16})
    layout |= {"showlegend": has_legend, "legend": {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0}}
    layout["annotations"] = []
    data: list[dict[str, Any]] = []
    for number, (type_, names) in enumerate(members.items()):
        row, column = divmod(number, across)
        suffix = str(number + 1) if number else ""
        left, right = column / across + 0.045 * bool(column), (column + 1) / across
        top = 1 - (row * (_PANEL_HEIGHT + _TITLE_HEIGHT) + 22) / inner
        layout[f"xaxis{suffix}"] = {"domain": [left, right], "anchor": f"y{suffix}", "zeroline": False, "nticks": 4}
        layout[f"yaxis{suffix}"] = {
            "domain": [top - _PANEL_HEIGHT / inner, top],
            "anchor": f"x{suffix}",
            "zeroline": False,
            "nticks": 4,
        }
        layout["annotations"].append(panel_title(type_, left, top))
        for run_number, (run, series) in enumerate(by_run.items()):
            color = COLORS[run_number % len(COLORS)]
            data += _band([series[name] for name in names if name in series], run.label, color, suffix, not number)
    return {"data": data, "layout": layout}


def _band(series: Iterable[Series], label: str, color: str, suffix: str, is_first: bool) -> list[dict[str, Any]]:
    series = list(series)
    if not series:
        return []
    found = grid(series, _POINTS_OF_PANEL)
    columns = np.flatnonzero(np.isfinite(found.values).any(axis=0))
    values = np.where(np.isfinite(found.values), found.values, np.nan)[:, columns]
    steps = [found.steps[column] for column in columns]
    axes = {"type": "scatter", "mode": "lines", "x": steps, "xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
    axes |= {"name": text(label), "legendgroup": text(label)}
    edge = {**axes, "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    middle = {**axes, "line": {"color": color, "width": 1.6}, "showlegend": is_first}
    middle |= {"y": packed(np.nanmedian(values, axis=0)), "hovertemplate": "step %{x}: %{y:.4g}"}
    if len(series) == 1:
        return [middle]
    filled = {"fill": "tonexty", "fillcolor": f"{color}33"}
    low, high = packed(np.nanmin(values, axis=0)), packed(np.nanmax(values, axis=0))
    return [{**edge, "y": low}, {**edge, "y": high, **filled}, middle]
