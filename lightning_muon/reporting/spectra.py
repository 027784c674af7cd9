"""The spectrum of one matrix's momentum over time, with the zone in which the polynomials fail."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_muon.logs import Series, layers
from lightning_muon.logs.rows import arrange, short_types
from lightning_muon.reporting.chart import Chart, Figure, Variant, axis_title, base_layout, packed, panel_title, text
from lightning_muon.reporting.grid import grid
from lightning_muon.reporting.runs import Run
from lightning_muon.reporting.zone import failure_limits

__all__ = ["spectra"]

_PERCENTS = (10, 25, 50, 75, 90, 95)
# From the large singular values to the small ones.
_COLORS = ("#b3c7e6", "#7ba3d6", "#2f7fc1", "#d99a2b", "#e0702b", "#b8321e")
_ZONE_COLOR = "rgba(194,58,58,0.22)"
_POINTS = 150
_CAPTION = (
    "σ at descending rank ⌈q·r⌉ of the normalised momentum: q10 is a large one, q95 a small one. Where a line is in the"
    " red zone, f(σ) < 0.1: that share of the directions and all below are missing from the update. A momentum that"
    " loses rank shows as lines that sink one after the other. The matrix that is chosen first has the lowest median at"
    " the end."
)


def spectra(runs: Sequence[Run], max_rows: int) -> Chart | None:
    """A figure for each parameter that any run logged the quantiles of.

    Args:
        runs: All of the report; those that have them get a panel each.
        max_rows: Of more parameters, some can be chosen.

    Returns:
        The chart; ``None`` if no run logged them.
    """
    quantiles = {run: found for run in runs if (found := {p: run.family(f"muon/momentum_q{p}") for p in _PERCENTS})[50]}
    if not quantiles:
        return None
    names = list(dict.fromkeys(name for of_run in quantiles.values() for name in of_run[50]))
    types, layer_of = short_types(layers(names).values()), layers(names)
    rows = arrange(names, max_rows)
    variants = [
        Variant(row.name, types[layer_of[row.name].type], _figure(row.name, quantiles, len(runs) > 1)) for row in rows
    ]
    lowest = min(range(len(rows)), key=lambda place: _last_median(rows[place].name, quantiles))
    variants.insert(0, variants.pop(lowest))
    notes = [] if len(rows) == len(names) else [f"{len(rows)} of {len(names)} parameters can be chosen; see --include."]
    notes += _unknown(quantiles)
    return Chart("Spectrum of one matrix", "Momentum", _CAPTION, variants, notes)


def _last_median(name: str, quantiles: Mapping[Run, Mapping[int, Mapping[str, Series]]]) -> float:
    last = [list(of_run[50][name].values())[-1] for of_run in quantiles.values() if of_run[50].get(name)]
    return min((value for value in last if value > 0), default=math.inf)


def _unknown(quantiles: Mapping[Run, Any]) -> list[str]:
    return [f"{run.label} has no muon_model.json, which says what fails." for run in quantiles if run.model is None]


def _figure(name: str, quantiles: Mapping[Run, Mapping[int, Mapping[str, Series]]], has_titles: bool) -> Figure:
    with_it = [run for run in quantiles if name in quantiles[run][50]]
    layout = base_layout(380, hovermode="x unified", showlegend=True, margin={"l": 66, "r": 20, "t": 30, "b": 44})
    layout["legend"] = {"orientation": "v", "traceorder": "normal"}
    layout["annotations"] = []
    data: list[dict[str, Any]] = []
    lowest, highest = math.inf, 0.0
    for number, run in enumerate(with_it):
        suffix = str(number + 1) if number else ""
        left, right = number / len(with_it) + 0.02 * bool(number), (number + 1) / len(with_it)
        axes = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
        series = {percent: quantiles[run][percent].get(name, {}) for percent in _PERCENTS}
        limits = _limits(run, name)
        shown = [value for one in (*series.values(), limits) for value in one.values() if 0 < value < math.inf]
        lowest, highest = min([lowest, *shown]), max([highest, *shown])
        data += _zone(limits, axes, is_first=not number)
        data += _lines(series, axes, is_first=not number)
        layout[f"xaxis{suffix}"] = {
            "domain": [left, right],
            "anchor": f"y{suffix}",
            "title": axis_title("optimizer step"),
            "zeroline": False,
        }
        layout[f"yaxis{suffix}"] = {"anchor": f"x{suffix}", "type": "log", "zeroline": False, "exponentformat": "power"}
        layout[f"yaxis{suffix}"] |= {"dtick": "D2"} if highest / lowest < 30 else {"dtick": 1}
        if has_titles:
            layout["annotations"].append(panel_title(run.label, left, 1))
    layout["yaxis"]["title"] = axis_title("σ, relative to the Frobenius norm")
    floor = lowest / 1.6
    for trace in data:
        if trace["name"] == "floor":
            trace["y"] = [floor] * len(trace["x"])
    for number in range(len(with_it)):
        layout[f"yaxis{number + 1 if number else ''}"]["range"] = [math.log10(floor), math.log10(highest * 1.4)]
    return {"data": data, "layout": layout}


def _limits(run: Run, name: str) -> Series:
    description = run.model.parameters.get(name) if run.model else None
    if description is None:
        return {}
    steps_taken = run.family("muon/ns_steps").get(name, {})
    participation = run.family("muon/momentum_participation_rank").get(name, {})
    return failure_limits(description, participation, steps_taken)


def _zone(limits: Series, axes: Mapping[str, str], is_first: bool) -> list[dict[str, Any]]:
    if not limits:
        return []
    kept = grid([limits], _POINTS)
    shared = {"type": "scatter", "mode": "lines", "x": list(kept.steps), "hoverinfo": "skip", **axes}
    zone = {"fill": "tonexty", "fillcolor": _ZONE_COLOR, "line": {"color": "#c23a3a", "width": 1, "dash": "dot"}}
    return [
        {**shared, "name": "floor", "line": {"width": 0}, "showlegend": False},
        {**shared, "name": "f(σ) < 0.1", "y": packed(kept.values[0]), "showlegend": is_first, **zone},
    ]


def _lines(series: Mapping[int, Series], axes: Mapping[str, str], is_first: bool) -> list[dict[str, Any]]:
    lines = []
    for (percent, one), color in zip(series.items(), _COLORS, strict=True):
        kept = grid([{step: value for step, value in one.items() if 0 < value < math.inf}], _POINTS)
        if kept.steps:
            lines.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": text(f"q{percent}"),
                    "x": list(kept.steps),
                    "y": packed(kept.values[0]),
                    "line": {"color": color, "width": 2.4 if percent == 50 else 1.4},
                    "hovertemplate": "%{y:.4g}",
                    "legendgroup": f"q{percent}",
                    "showlegend": is_first,
                    **axes,
                }
            )
    return lines
