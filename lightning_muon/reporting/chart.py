"""What a chart is, and what all have in common. Figures are plotly's JSON as plain dictionaries."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["COLORS", "GRAY", "Chart", "Figure", "Variant", "axis_title", "base_layout", "packed", "panel_title", "text"]

Figure = dict[str, Any]

# After Okabe and Ito, which colour-blind readers can tell apart; light enough for dark pages, dark enough for paper.
COLORS = ("#2f7fc1", "#e0702b", "#1f9e77", "#b45fa8", "#b8940b", "#5b5fc7", "#d0506b", "#5f8f2b")
GRAY = "#8a8a8a"


@dataclass(frozen=True)
class Variant:
    """One of the figures that a reader can choose between."""

    label: str
    group: str
    figure: Figure


@dataclass(frozen=True)
class Chart:
    """A figure with what is to be said about it.

    Attributes:
        title: A few words.
        section: Where it stands.
        caption: What to look for.
        figures: One; of several the first is shown, and the reader can choose.
        notes: What was left out.
    """

    title: str
    section: str
    caption: str
    figures: Sequence[Variant]
    notes: Sequence[str] = field(default_factory=tuple)


def text(name: str) -> str:
    """A name for plotly, which reads some HTML in what it shows."""
    return escape(name, quote=False)


def packed(values: ArrayLike) -> dict[str, str]:
    """Numbers as plotly's typed array of float32, a third of the size of text; 7 digits.

    Args:
        values: One or two dimensions; NaN is a gap.
    """
    array = np.ascontiguousarray(values, dtype="<f4")
    found = {"dtype": "f4", "bdata": base64.b64encode(array.tobytes()).decode()}
    return found if array.ndim == 1 else {**found, "shape": ", ".join(map(str, array.shape))}


def base_layout(height: int, **others: Any) -> dict[str, Any]:
    """The layout that all figures start from; the page sets colours of text and lines by its theme.

    Args:
        height: Pixels.
        others: What is different.
    """
    return {
        "height": height,
        "margin": {"l": 60, "r": 20, "t": 30, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 12},
        "hoverlabel": {"namelength": -1},
        "showlegend": False,
        **others,
    }


def axis_title(title: str) -> dict[str, Any]:
    """The title of an axis, close to it."""
    return {"text": text(title), "standoff": 6, "font": {"size": 12}}


def panel_title(title: str, x: float, y: float, **others: Any) -> dict[str, Any]:
    """The title of a panel: an annotation above its upper left corner, in fractions of the figure."""
    place = {"x": x, "y": y, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
    return {"text": text(title), "showarrow": False, "font": {"size": 12}, **place, **others}
