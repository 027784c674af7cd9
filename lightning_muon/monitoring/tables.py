"""From what a process found of some matrices to one vector for each parameter, in few launches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_muon.matrices import MatrixKey

__all__ = ["entries", "tables"]


class _Parameter(Protocol):
    @property
    def key(self) -> str: ...
    @property
    def param(self) -> Tensor: ...
    @property
    def numels(self) -> Sequence[int]: ...
    @property
    def ranks(self) -> Sequence[int]: ...


def entries(
    wanted: Sequence[_Parameter], keys: Sequence[MatrixKey], values: Tensor | None, columns: int = 1
) -> list[Tensor]:
    """A row per matrix; a vector has one as well. What is found twice of a matrix is added.

    Args:
        wanted: The parameters; what is found of others is left out.
        keys: The matrices of which something is found.
        values: ``(len(keys), columns)``, or ``(len(keys),)`` for one column; ``None`` if there are none.
        columns: How many figures there are of each.

    Returns:
        For each parameter ``(matrices · columns,)``, float64, row by row.
    """
    counts = [len(one.numels) for one in wanted]
    return _place(wanted, counts, keys, None if values is None else values.reshape(-1, columns), columns)


def tables(wanted: Sequence[_Parameter], keys: Sequence[MatrixKey], rows: Tensor | None, columns: int) -> list[Tensor]:
    """A row per matrix, whose last column is 1 for the matrices of which something is found.

    Args:
        wanted: The parameters; what is found of others is left out.
        keys: The matrices of which something is found.
        rows: ``(len(keys), columns)``; ``None`` if there are none.
        columns: How many figures there are of each.

    Returns:
        For each parameter ``(matrices · (columns + 1),)``, float64, row by row; a vector has none.
    """
    counts = [len(one.ranks) for one in wanted]
    known = None if rows is None else torch.cat([rows.double(), rows.new_ones(len(rows), 1, dtype=torch.float64)], 1)
    return _place(wanted, counts, keys, known, columns + 1)


def _place(
    wanted: Sequence[_Parameter], counts: Sequence[int], keys: Sequence[MatrixKey], rows: Tensor | None, width: int
) -> list[Tensor]:
    if not wanted:
        return []
    device, firsts = wanted[0].param.device, list(itertools.accumulate(counts, initial=0))
    first_of = {one.key: first for one, first, count in zip(wanted, firsts, counts, strict=False) if count}
    places = [(first_of[name] + number, place) for place, (name, number) in enumerate(keys) if name in first_of]
    found = torch.zeros(firsts[-1], width, dtype=torch.float64, device=device)
    if rows is not None and places:
        targets, sources = (torch.tensor(one, device=device) for one in zip(*places, strict=True))
        found.index_add_(0, targets, rows.to(device, torch.float64)[sources])
    return [part.reshape(-1) for part in torch.split(found, list(counts))]
