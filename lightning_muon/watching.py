"""What a step is asked to keep for the monitors, and what it has kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_muon.alignment import Alignments
from lightning_muon.matrices import MatrixKey

__all__ = ["Watch"]


@dataclass
class Watch:
    """Changed in place only: Lightning's and Fabric's wrappers call the optimizer's methods with attributes of their
    own.

    Attributes:
        next: The parameters whose spectra the next step is to keep; ``None`` if nobody watches it.
        last: The same of the last step; ``None`` as well from the time the next one was asked for until it is done.
        spectra: Singular values that the last step has kept.
        wants_alignments: Whether the next step is to keep inner products.
        alignments: Those that the last step has kept; ``None`` if nobody asked.
        moved: The parameters that AdamW has updated in the last step, as far as this process knows.
        rates: The learning rate of each group, by its name, in the last step: a scheduler changes it right after.
    """

    next: frozenset[str] | None = None
    last: frozenset[str] | None = None
    spectra: dict[MatrixKey, Tensor] = field(default_factory=dict)
    wants_alignments: bool = False
    alignments: Alignments | None = None
    moved: set[str] = field(default_factory=set)
    rates: dict[str, float] = field(default_factory=dict)

    def ask(self, names: frozenset[str], alignments: bool) -> None:
        """Watch the next step; what is asked for before one step adds up."""
        self.next = names | (self.next or frozenset())
        self.wants_alignments = self.wants_alignments or alignments
        self.last, self.spectra, self.alignments = None, {}, None

    def begin(self, param_groups: Iterable[Mapping[str, Any]]) -> None:
        """The next step is the last one now."""
        self.last, self.next, self.spectra = self.next, None, {}
        self.alignments = Alignments() if self.wants_alignments else None
        self.wants_alignments, self.moved = False, set()
        self.rates = {group["name"]: float(group["lr"]) for group in param_groups}
