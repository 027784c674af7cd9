"""What TensorBoard's custom scalars show: a panel for each quantity and layer type, instead of a card for each key."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable

from lightning_muon.logs import layers
from lightning_muon.logs.keys import matrix_names, own_keys
from lightning_muon.logs.rows import short_types
from lightning_muon.reporting.catalogue import QUANTITIES

__all__ = ["Layout", "custom_scalars_layout"]

Layout = dict[str, dict[str, list[str | list[str]]]]
"""For ``SummaryWriter.add_custom_scalars``: chart by title by category."""

_OVERVIEW, _SPECTRUM = "All layers: mean, smallest and largest", "Spectrum of the momentum"
_QUANTILE = "muon/momentum_q"
_NORMS = {"muon/weight_rms": "Weight RMS", "muon/weight_spectral_norm": "Spectral norm of the weights"}
_GRAD_NORM = "muon/grad_norm"


def custom_scalars_layout(keys: Collection[str]) -> Layout:
    """The layout for these keys.

    The first category has one band for each quantity, over all layers. Then each quantity has a category with a chart
    for each layer type, a line for each block; and the momentum's quantiles have one with a chart for each layer type,
    of its middle block. TensorBoard takes the keys as regular expressions, so a chart of many blocks is one pattern.

    Args:
        keys: All that are logged.
    """
    titles = _NORMS | {one.family: one.title for one in QUANTITIES if one.in_tensorboard}
    matrices = matrix_names(keys)
    layout: Layout = {_OVERVIEW: {}}
    for family, title in titles.items():
        parts = [f"{family}/_{which}" for which in ("mean", "min", "max")]
        if set(parts) <= set(keys):
            layout[_OVERVIEW][title] = ["Margin", parts]
    if norms := [key for key in keys if key.startswith(_GRAD_NORM)]:
        layout[_OVERVIEW]["Norm of the gradient"] = ["Multiline", [f"^{re.escape(key)}$" for key in norms]]
    if spectra := _spectra(keys):
        layout[_SPECTRUM] = spectra
    for family, title in titles.items():
        names = own_keys(keys, family)
        if names:  # of parameters, the matrices: vectors would be as many panels again
            layout[title] = _by_type(family, matrices.intersection(names) or names)
    return {category: charts for category, charts in layout.items() if charts}


def _by_type(family: str, names: Iterable[str]) -> dict[str, list[str | list[str]]]:
    """A chart for each type, whose pattern matches its blocks and nothing beside them."""
    types = {layer.type for layer in layers(names).values()}
    short = short_types(layers(names).values())
    return {short[type_]: ["Multiline", [f"^{re.escape(family)}/{_pattern(type_)}$"]] for type_ in sorted(types)}


def _pattern(type_: str) -> str:
    head, star, tail = type_.partition("*")
    return re.escape(head) + (r"\d+" if star else "") + re.escape(tail)


def _spectra(keys: Collection[str]) -> dict[str, list[str | list[str]]]:
    names = own_keys(keys, f"{_QUANTILE}50")
    layer_of = layers(names)
    short = short_types(layer_of.values())
    by_type: dict[str, list[str]] = defaultdict(list)
    for name, layer in layer_of.items():
        by_type[layer.type].append(name)
    middle = {
        type_: sorted(of_type, key=lambda name: layer_of[name].block or 0)[len(of_type) // 2]
        for type_, of_type in by_type.items()
    }
    return {
        _spectrum_title(short[type_], layer_of[name].block): [
            "Multiline",
            [rf"^{re.escape(_QUANTILE)}\d+/{re.escape(name)}$"],
        ]
        for type_, name in middle.items()
    }


def _spectrum_title(type_: str, block: int | None) -> str:
    return type_ if block is None else f"{type_} of block {block}"
