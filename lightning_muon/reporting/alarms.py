"""How many things were in trouble, by kind and over time."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_muon.reporting.catalogue import Quantity
from lightning_muon.reporting.chart import Chart
from lightning_muon.reporting.heatmap import heat_map
from lightning_muon.reporting.runs import Run

__all__ = ["FAMILY", "alarms"]

FAMILY = "muon/alarms"
_CAPTION = (
    "How many parameters, layers or heads were in trouble, by the kind of alarm. The messages are in the training's"
    " output, where each began."
)


def alarms(runs: Sequence[Run]) -> Chart | None:
    """A strip for each kind, red where it stands; ``None`` if no run logged alarms.

    Args:
        runs: All of the report; filters of layers do not apply to kinds of alarms.
    """
    unfiltered = [run.without_filters() for run in runs]
    highest = max(
        (value for run in unfiltered for series in run.family(FAMILY).values() for value in series.values()),
        default=0.0,
    )
    quantity = Quantity(
        FAMILY, "Alarms", "Alarms", _CAPTION, "", limits=(0, max(1.0, highest)), is_bad_high=True, is_of_matrices=False
    )
    return heat_map(quantity, unfiltered, max_rows=100)
