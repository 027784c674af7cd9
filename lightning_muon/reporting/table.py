"""The layers with their last values, as an HTML table that a reader can sort."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from lightning_muon.logs import ParameterDescription
from lightning_muon.reporting.runs import Run

__all__ = ["last_values"]

_COLUMNS = {
    "muon/update_rms": "update RMS",
    "muon/update_weight_ratio": "update/weight",
    "muon/weight_rms": "weight RMS",
    "muon/weight_spectral_norm": "‖W‖₂",
    "muon/weight_svd_entropy": "SVD entropy",
    "muon/momentum_q50": "σ q50",
    "muon/momentum_q95": "σ q95",
    "muon/momentum_participation_rank": "part. rank",
    "muon/ns_fail_frac": "missed",
    "muon/ns_descent_kept": "descent kept",
    "muon/ns_steps": "steps",
    "attention/max_logit": "max logit",
    "moe/max_vio": "MaxVio",
}


def last_values(runs: Sequence[Run]) -> str:
    """The table as HTML: one row per run and layer, a column per quantity that any run logged."""
    logged = {run: {key: found for key in _COLUMNS if (found := run.family(key))} for run in runs}
    columns = [key for key in _COLUMNS if any(key in of_run for of_run in logged.values())]
    has_runs, has_shapes = len(runs) > 1, any(run.model for run in runs)
    head = ["layer", *(["run"] if has_runs else []), *(["matrices"] if has_shapes else [])]
    head += [_COLUMNS[key] for key in columns]
    rows = []
    for run in runs:
        for name in dict.fromkeys(name for series in logged[run].values() for name in series):
            cells = [f"<th scope=row>{escape(name)}</th>"]
            cells += [f"<td class=text>{escape(run.label)}</td>"] if has_runs else []
            description = run.model.parameters.get(name) if run.model else None
            cells += [f"<td class=text>{_shapes(description)}</td>"] if has_shapes else []
            cells += [_cell(list(logged[run].get(key, {}).get(name, {}).values())[-1:]) for key in columns]
            rows.append(f"<tr>{''.join(cells)}</tr>")
    if not rows:
        return ""
    headings = "".join(
        f"<th scope=col{' class=text' if one in ('run', 'matrices') else ''}>"
        f"<button type=button>{escape(one)}</button></th>"
        for one in head
    )
    return f"<table class=sortable><thead><tr>{headings}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "</tbody></table>"


def _shapes(description: ParameterDescription | None) -> str:
    matrices = description.matrices if description else ()
    return ", ".join(f"{rows}×{cols}" + (f" ({count})" if count > 1 else "") for rows, cols, count in matrices)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "<td></td>"
    (value,) = values
    order = repr(value) if math.isfinite(value) else "1e999"
    return f'<td data-value="{order}">{value:.4g}</td>'
