"""How the matrices of a stage become whole on their owners, and how their updates return; here, without travelling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from lightning_muon.matrices import MatrixKey, MatrixPart

__all__ = ["Exchange", "InPlace"]


class Exchange(Protocol):
    """One stage of one step: ``gather``, ``matrices``, ``give_back`` (in batches), ``send_back``, ``returned``.

    What is gathered may travel until ``matrices``, and what is sent back until ``returned``. Results come as the number
    of one of this process's parts in what it gathered, and its piece of the result.
    """

    def gather(self, parts: Sequence[tuple[MatrixPart, Tensor]]) -> None:
        """Start to send this process's parts to the owners of the matrices.

        Args:
            parts: Every part with its values, `(rows, cols)` of the part; not to be changed before ``matrices``.
        """

    def matrices(self) -> Mapping[MatrixKey, Tensor]:
        """Wait for the matrices that this process owns, whole. Not to be written to."""

    def give_back(self, results: Mapping[MatrixKey, Tensor]) -> Iterable[tuple[int, Tensor]]:
        """Take results, of the shape of owned matrices; give those that have not far to go."""

    def send_back(self) -> Iterable[tuple[int, Tensor]]:
        """Start to send the pieces of the results to whoever holds them; give those that are here."""

    def returned(self) -> Iterable[tuple[int, Tensor]]:
        """Wait for the results that have travelled."""


class InPlace:
    """Every part is a whole matrix, and stays where it is."""

    def __init__(self) -> None:
        self._numbers: dict[MatrixKey, int] = {}
        self._matrices: dict[MatrixKey, Tensor] = {}

    def gather(self, parts: Sequence[tuple[MatrixPart, Tensor]]) -> None:
        """Nothing travels."""
        for number, (part, values) in enumerate(parts):
            self._numbers[part.key], self._matrices[part.key] = number, values

    def matrices(self) -> Mapping[MatrixKey, Tensor]:
        """The parts."""
        return self._matrices

    def give_back(self, results: Mapping[MatrixKey, Tensor]) -> Iterable[tuple[int, Tensor]]:
        """All of it, at once."""
        return [(self._numbers[key], result) for key, result in results.items()]

    def send_back(self) -> Iterable[tuple[int, Tensor]]:
        """Nothing is left."""
        return ()

    def returned(self) -> Iterable[tuple[int, Tensor]]:
        """Nothing was sent."""
        return ()
