"""What a monitor wants to know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_muon.arguments import Mode, check_mode, check_pattern
from lightning_muon.monitoring.families import FAMILIES, OF_ALIGNMENTS, OF_SPECTRA, OF_UPDATES, WATCHED
from lightning_muon.muon import Muon

__all__ = ["Mode", "Request"]


@dataclass(frozen=True)
class Request:
    """What a monitor wants to know.

    Args:
        families: Names of measures, from ``FAMILIES``.
        include: Regular expression that a parameter's name must match somewhere; ``None`` takes all.
        exclude: Regular expression that it must not match.
        mode: For a parameter of several matrices, ``"brief"`` gives the median, minimum and maximum;
            ``"detailed"`` gives each matrix as well.

    Raises:
        ValueError: An unknown mode or measure.
    """

    families: tuple[str, ...]
    include: str | None = None
    exclude: str | None = None
    mode: Mode = "brief"

    def __post_init__(self) -> None:
        check_mode(self.mode)
        check_pattern("include", self.include)
        check_pattern("exclude", self.exclude)
        unknown = set(self.families) - set(FAMILIES)
        if unknown:
            raise ValueError(f"Unknown measures {sorted(unknown)}; choose from {', '.join(FAMILIES)}.")

    def wants(self, name: str) -> bool:
        """Whether the request is about this parameter."""
        included = self.include is None or re.search(self.include, name) is not None
        return included and (self.exclude is None or re.search(self.exclude, name) is None)

    @property
    def is_watching(self) -> bool:
        """Whether the step has to be told, by ``Muon.watch_next_step``."""
        return not WATCHED.isdisjoint(self.families)

    @property
    def has_spectra(self) -> bool:
        """Whether it is about the momentum's singular values."""
        return not OF_SPECTRA.isdisjoint(self.families)

    @property
    def has_alignments(self) -> bool:
        """Whether it is about how gradient, momentum and update lie to each other."""
        return not OF_ALIGNMENTS.isdisjoint(self.families)

    @property
    def has_updates(self) -> bool:
        """Whether it is about the size of the update."""
        return not OF_UPDATES.isdisjoint(self.families)

    def spectra_of(self, optimizer: Muon, names: Mapping[Tensor, str] | None = None) -> set[str]:
        """The parameters whose momentum's singular values are wanted, by their names in the optimizer.

        Args:
            optimizer: The optimizer.
            names: What requests call a parameter, where that is not its name in its optimizer.
        """
        if not self.has_spectra:
            return set()
        return {
            key
            for key, param in optimizer.named_parameters()
            if optimizer.routes[key].algorithm == "muon" and self.wants((names or {}).get(param, key))
        }
