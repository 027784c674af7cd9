"""The measurements of one run, one after the other, and what is said about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_muon.monitoring.alarms import Alarms
from lightning_muon.monitoring.bounds import WeightBounds
from lightning_muon.monitoring.collect import Collection, collect
from lightning_muon.monitoring.request import Request
from lightning_muon.monitoring.subject import Subject
from lightning_muon.monitoring.troubles import NOT_FINITE, judges

__all__ = ["Session", "Sighting"]


@dataclass(frozen=True)
class Sighting:
    """What a look has shown, and what to say of it.

    Attributes:
        collection: What was found; its values have how many things are in trouble, ``muon/alarms/<kind>``.
        warnings: Texts, for one process to say.
    """

    collection: Collection
    warnings: Sequence[str]


class Session:
    """Remembers from one measurement to the next what alarms have to know."""

    def __init__(self) -> None:
        self._alarms = Alarms()
        self._judges = judges(WeightBounds())

    def look(
        self, optimizers: Sequence[Subject], requests: Sequence[Request], names: Mapping[Tensor, str] | None = None
    ) -> Sighting:
        """Measure and judge; see ``collect``. On every process."""
        collection = collect(optimizers, requests, names, self._judges)
        warnings = self._alarms.hear(collection.findings)
        standing = self._alarms.standing()
        judged = {finding.kind for finding in collection.findings}
        judged |= {NOT_FINITE} if judged else set()
        collection.values |= {f"muon/alarms/{kind}": float(standing.get(kind, 0)) for kind in sorted(judged)}
        return Sighting(collection, warnings)
