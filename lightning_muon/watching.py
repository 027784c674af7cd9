"""What a step is asked to keep for the monitors, and what it has kept."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

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
    """

    next: frozenset[str] | None = None
    last: frozenset[str] | None = None
    spectra: dict[MatrixKey, Tensor] = field(default_factory=dict)

    def ask(self, names: frozenset[str]) -> None:
        """Watch the next step; what is asked for before one step adds up."""
        self.next = names | (self.next or frozenset())
        self.last, self.spectra = None, {}

    def begin(self) -> None:
        """The next step is the last one now."""
        self.last, self.next, self.spectra = self.next, None, {}
