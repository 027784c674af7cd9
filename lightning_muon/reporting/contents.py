"""What a report shows, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_muon.reporting.alarms import alarms
from lightning_muon.reporting.catalogue import QUANTITIES, Quantity
from lightning_muon.reporting.chart import Chart
from lightning_muon.reporting.curves import curves, panels_by_type
from lightning_muon.reporting.heatmap import heat_map
from lightning_muon.reporting.runs import Run
from lightning_muon.reporting.spectra import spectra

__all__ = ["Section", "contents"]

_ORDER = (
    "Alarms",
    "Loss",
    "Updates",
    "Momentum",
    "Newton–Schulz",
    "Weights",
    "Gradients",
    "Attention",
    "Mixture of experts",
)
# These depend on the model: nothing is missing where they are not.
_OF_SOME_MODELS = ("Attention", "Mixture of experts")


@dataclass
class Section:
    """A heading and what is below it.

    Attributes:
        title: The heading.
        charts: In order.
        missing: What could be here, and what logs it.
    """

    title: str
    charts: list[Chart] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def contents(runs: Sequence[Run], loss_pattern: str, max_rows: int) -> list[Section]:
    """All charts that the runs have something for.

    Args:
        runs: All of the report.
        loss_pattern: Regular expression for the keys of the loss curves.
        max_rows: Of more layers than these, some are shown.
    """
    sections = {title: Section(title) for title in _ORDER}
    charts = [
        alarms(runs),
        curves("Loss", "Loss", _LOSS, runs, loss_pattern, "loss"),
        spectra(runs, max_rows),
        *(_quantity(one, runs, max_rows, sections[one.section]) for one in QUANTITIES),
        panels_by_type("Weight RMS", "Weights", _WEIGHT_RMS, runs, "muon/weight_rms"),
        panels_by_type("Spectral norm of the weights", "Weights", _SPECTRAL_NORM, runs, "muon/weight_spectral_norm"),
        curves("Norm of the gradient", "Gradients", _GRAD_NORM, runs, r"^muon/grad_norm(_\w+)?$", "norm"),
    ]
    for chart in charts:
        if chart is not None:
            sections[chart.section].charts.append(chart)
    _say_what_is_missing(sections, loss_pattern)
    return [section for section in sections.values() if section.charts or section.missing]


def _quantity(quantity: Quantity, runs: Sequence[Run], max_rows: int, section: Section) -> Chart | None:
    chart = heat_map(quantity, runs, max_rows)
    if chart is None and not quantity.is_constant_left_out and section.title not in _OF_SOME_MODELS:
        section.missing.append(f"{quantity.title} ({quantity.family}/…): {quantity.logged_by}")
    return chart


def _say_what_is_missing(sections: dict[str, Section], loss_pattern: str) -> None:
    if not sections["Loss"].charts:
        sections["Loss"].missing.append(f"No logged key matches {loss_pattern!r}: --loss REGEX chooses others.")
    titles = [chart.title for chart in sections["Weights"].charts]
    if "Weight RMS" not in titles:
        sections["Weights"].missing.append("Norms of the weights (muon/weight_rms/…): WeightNormMonitor")
    if not sections["Gradients"].charts:
        sections["Gradients"].missing.append(
            "Norm of the gradient (muon/grad_norm): any monitor, where a sharded strategy clips by norm"
        )


_LOSS = "Every logged loss. Runs can be compared where they saw the same data in the same order."
_WEIGHT_RMS = (
    "The median over the blocks, in the band from the smallest to the largest. Under weight decay it levels off; a line"
    " that keeps rising means that the decay is too weak for the learning rate, or absent."
)
_SPECTRAL_NORM = (
    "The largest singular value. It should level off like the RMS; one that grows while the RMS does not is a direction"
    " that runs away."
)
_GRAD_NORM = (
    "Before clipping, of all parameters and of either algorithm's. The size of all gradients so far does not matter to"
    " the update; a spike weighs much in the momentum for some steps."
)
