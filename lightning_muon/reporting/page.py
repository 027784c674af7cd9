"""One HTML page with everything in it: nothing is loaded from anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby

from lightning_muon.logs import ParameterDescription
from lightning_muon.reporting.chart import Chart, Variant
from lightning_muon.reporting.contents import Section
from lightning_muon.reporting.runs import Run
from lightning_muon.reporting.table import last_values

__all__ = ["page"]


def page(runs: Sequence[Run], sections: Sequence[Section], notes: Iterable[str], plotly_js: str) -> str:
    """Put the page together.

    Args:
        runs: All of the report.
        sections: Its charts.
        notes: What was left out of the report.
        plotly_js: plotly's JavaScript, which draws the figures.

    Returns:
        HTML; names are escaped.
    """
    assets = files("lightning_muon.reporting") / "assets"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    title = " and ".join(escape(run.label) for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    table = last_values(runs)
    links = [*(section.title for section in sections), *(["Layers"] if table else [])]
    body = [
        f"<h1>{title}</h1>",
        _head(runs),
        *(f"<p class=note>{escape(note)}</p>" for note in notes),
        f"<p class=note>{_HOW_TO}</p>",
        "<nav>" + " ".join(f'<a href="#{_anchor(one)}">{escape(one)}</a>' for one in links) + "</nav>",
    ]
    number = 0
    for section in sections:
        body.append(f'<section id="{_anchor(section.title)}"><h2>{escape(section.title)}</h2>')
        for chart in section.charts:
            number += 1
            body.append(_chart(chart, f"figure-{number}"))
        body.append(_missing(section))
        body.append("</section>")
    if table:
        body.append(f'<section id="{_anchor("Layers")}"><h2>Layers</h2>{_TABLE_CAPTION}')
        body.append(f"<div class=table>{table}</div></section>")
    return (
        "<!DOCTYPE html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{title} · lightning-muon report</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{style}</style></head>\n<body><main>\n" + "\n".join(body) + "\n</main>\n"
        f"<script>{plotly_js}</script>\n<script>\n{script}</script></body></html>\n"
    )


def _head(runs: Sequence[Run]) -> str:
    rows = "".join(
        "<tr>"
        + f"<th scope=row><i class=run-{number % 8}></i>{escape(run.label)}</th>"
        + f"<td>{f'{run.model.num_parameters:,}' if run.model else '–'}</td>"
        + f"<td>{run.last_step:,}</td>"
        + f"<td class=text>{escape(_orthogonalizations(run))}</td>"
        + f"<td class=text>{run.started or '–'}</td><td class=text>{run.last_written}</td></tr>"
        for number, run in enumerate(runs)
    )
    head = "".join(
        f"<th scope=col>{one}</th>"
        for one in ("run", "parameters", "last step", "orthogonalization", "started", "logs written")
    )
    return f"<table class=runs><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _orthogonalizations(run: Run) -> str:
    parameters = run.model.parameters.values() if run.model else ()
    return "; ".join(dict.fromkeys(_in_words(one) for one in parameters)) or "–"


def _in_words(description: ParameterDescription) -> str:
    given = description.orthogonalization
    if isinstance(given, str):
        name = given
    elif isinstance(given, tuple):
        name = f"{len(given)} steps of its own"
    else:
        options = ", ".join(f"{key} {value}" for key, value in given.items() if key != "name")
        name = f"{given.get('name')} ({options})"
    return f"{name}, {description.dtype}"


def _chart(chart: Chart, identifier: str) -> str:
    figures = [variant.figure for variant in chart.figures]
    # "<" would end the element, or begin a comment in it
    content = json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        f"<figure><h3>{escape(chart.title)}</h3>"
        + _choice(chart.figures, identifier)
        + f"<figcaption>{escape(chart.caption)}"
        + "".join(f" <em>{escape(note)}</em>" for note in chart.notes)
        + f'</figcaption><div class=plot id="{identifier}"></div>'
        + f'<script type="application/json" id="{identifier}-data">{content}</script></figure>'
    )


def _choice(variants: Sequence[Variant], identifier: str) -> str:
    """A drop-down list, where there is something to choose."""
    if len(variants) == 1 and not variants[0].label:
        return ""
    numbered = sorted(enumerate(variants), key=lambda one: one[1].group)
    groups = []
    for group, members in groupby(numbered, key=lambda one: one[1].group):
        options = "".join(
            f'<option value="{number}"{" selected" if number == 0 else ""}>{escape(variant.label)}</option>'
            for number, variant in members
        )
        groups.append(f'<optgroup label="{escape(group)}">{options}</optgroup>')
    return f'<label>Matrix <select data-figure="{identifier}">{"".join(groups)}</select></label>'


def _missing(section: Section) -> str:
    if not section.missing:
        return ""
    items = "".join(f"<li>{escape(one)}</li>" for one in section.missing)
    return f"<details class=missing><summary>Not in these logs, and what logs it</summary><ul>{items}</ul></details>"


def _anchor(title: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in title.lower())


_HOW_TO = "Point at anything for its name and value; drag to zoom, double-click to return."
_TABLE_CAPTION = (
    "<p>The last logged values; of a parameter of several matrices, the median over them. A click on a heading"
    " sorts.</p>"
)
