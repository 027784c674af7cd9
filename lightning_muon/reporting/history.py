"""What was measured so far of a quantity, in bounded memory: evenly spread over the training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from lightning_muon.reporting.grid import Grid

__all__ = ["History"]


class History:
    """Layers × time, growing. Where it is full, every second measurement is forgotten, and of the following ones too.

    The newest measurement is always there.

    Args:
        max_columns: Measurements that are kept, 2 or more.
    """

    def __init__(self, max_columns: int) -> None:
        self._max_columns = max_columns
        self._rows: dict[str, int] = {}
        self._steps: list[int] = []
        self._columns: list[NDArray[np.float64]] = []
        self._measured = 0
        self._stride = 1

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, in the order in which they were first measured."""
        return tuple(self._rows)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Remember a measurement.

        Args:
            step: Later than all before, or the last one again.
            values: By layer; those of another step need not be the same layers.
        """
        if not values:
            return
        for name in values:
            self._rows.setdefault(name, len(self._rows))
        column = np.full(len(self._rows), np.nan)
        if self._steps and self._steps[-1] == step:
            column[: len(self._columns[-1])] = self._columns[-1]
            self._columns[-1] = column
        else:
            is_newest_for_good = (self._measured - 1) % self._stride == 0
            if self._steps and not is_newest_for_good:
                del self._steps[-1], self._columns[-1]
            self._steps.append(step)
            self._columns.append(column)
            self._measured += 1
        for name, value in values.items():
            column[self._rows[name]] = value
        if len(self._steps) > self._max_columns:
            del self._steps[1:-1:2], self._columns[1:-1:2]
            self._stride *= 2

    def grid(self, names: Iterable[str]) -> Grid:
        """The measurements of these layers.

        Args:
            names: Any of ``names``, in the order of the rows.
        """
        values = np.full((len(self._rows), len(self._steps)), np.nan)
        for place, column in enumerate(self._columns):
            values[: len(column), place] = column
        return Grid(tuple(self._steps), values[[self._rows[name] for name in names]], self._measured)
