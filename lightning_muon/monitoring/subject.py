"""What the monitors ask of an optimizer: ``Muon`` answers by itself, others through ``ObservedOptimizer``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from lightning_muon.matrices import MatrixKey
from lightning_muon.muon_step import UpdateRecord
from lightning_muon.partition import Partition, Range
from lightning_muon.routes import Route
from lightning_muon.watching import Watch

__all__ = ["Subject"]


class Subject(Protocol):
    """An optimizer that can be measured; ``lightning_muon.Muon`` documents the members."""

    param_groups: list[dict[str, Any]]
    state: Any
    last_grad_norms: dict[str, Tensor]

    @property
    def routes(self) -> Mapping[str, Route]:
        """The decision on every parameter, by name: how it is read as matrices."""

    @property
    def partition(self) -> Partition:
        """Who this process shares the work with."""

    @property
    def watch(self) -> Watch:
        """What was asked of the next and of the last step."""

    @property
    def update_records(self) -> Sequence[UpdateRecord]:
        """What the last step did to this process's matrices."""

    @property
    def momentum_spectra(self) -> Mapping[MatrixKey, Tensor]:
        """Of the last step, the singular values of what was orthogonalised."""

    def local_ranges(self, name: str, param: Tensor) -> Sequence[Range]:
        """The runs of elements that this process answers for."""
