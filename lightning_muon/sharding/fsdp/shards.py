"""Which elements of a parameter a rank holds: from a ``DTensor`` to index ranges, and to rows and columns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muon.matrices import MatrixLayout, MatrixPart
from lightning_muon.partition import Range

__all__ = ["Shard", "held_indices", "shard_of"]

Runs = tuple[Range, ...]


@dataclass(frozen=True)
class Shard:
    """The indices that a rank holds in each dimension of a parameter: what it holds is their product.

    Attributes:
        shape: The parameter's.
        indices: Ascending runs for each dimension.
    """

    shape: tuple[int, ...]
    indices: tuple[Runs, ...]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the rank's memory."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self.indices)

    @property
    def numel(self) -> int:
        """The elements that the rank holds."""
        return math.prod(self.local_shape)

    def take(self, whole: Tensor) -> Tensor:
        """What the rank holds of something of the parameter's shape."""
        for dim, runs in enumerate(self.indices):
            pieces = [whole.narrow(dim, start, stop - start) for start, stop in runs or ((0, 0),)]
            whole = torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]
        return whole

    def parts(self, name: str, layout: MatrixLayout) -> list[MatrixPart]:
        """What the rank holds of each matrix of the parameter.

        Raises:
            ValueError: The shard is not made of runs of rows within one run of columns of the matrices.
        """
        rows, cols = self._table(layout)
        return layout.parts(name, rows, cols)

    def _table(self, layout: MatrixLayout) -> tuple[Runs, Range]:
        """The rows and the columns of the shard in the table of all matrices below each other."""
        boundary = max(dim for dim in range(len(self.shape) + 1) if math.prod(self.shape[dim:]) == layout.cols)
        rows: Runs = ((0, 1),)
        for size, runs in zip(self.shape[:boundary], self.indices[:boundary], strict=True):
            rows = _nested(rows, size, runs)
        cols: Runs = ((0, 1),)
        for size, runs in zip(self.shape[boundary:], self.indices[boundary:], strict=True):
            cols = _nested(cols, size, runs)
        if len(cols) > 1:
            raise ValueError(f"columns {cols} of the matrices")
        return (rows, cols[0]) if cols else ((), (0, 0))


def held_indices(size: int, splits: Iterable[tuple[int, int, int]]) -> Runs:
    """The indices of one dimension that a rank holds, after splits one within the other.

    Args:
        size: Of the dimension.
        splits: ``(number of chunks, which one, interleave)``: what is left is cut into ``interleave`` pieces, and the
            chunk taken of each of them; the cuts are ``torch.chunk``'s.
    """
    indices = torch.arange(size)
    for num_chunks, which, interleave in splits:
        taken: list[Tensor] = []
        for piece in torch.chunk(indices, interleave):
            chunks = torch.chunk(piece, num_chunks)
            taken += chunks[which : which + 1]
        indices = torch.cat(taken) if taken else indices[:0]
    if not len(indices):
        return ()
    breaks = (torch.nonzero(indices.diff() != 1).flatten() + 1).tolist()
    edges = itertools.pairwise([0, *breaks, len(indices)])
    return tuple((int(indices[first]), int(indices[last - 1]) + 1) for first, last in edges)


def shard_of(param: Tensor) -> Shard:
    """What this rank holds of a parameter.

    Raises:
        ValueError: The parameter's layout is none that this reading covers; the text names it.
    """
    placements = getattr(param, "placements", None)
    shape = tuple(param.shape)
    if placements is None:
        return Shard(shape, tuple(((0, size),) if size else () for size in shape))
    mesh = param.device_mesh  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate()
    splits: list[list[tuple[int, int, int]]] = [[] for _ in shape]
    for axis, placement in enumerate(placements):
        if placement.is_partial():
            raise ValueError(f"{placements} on the mesh {mesh.mesh_dim_names}: a sum that was not reduced")
        if not placement.is_replicate():  # Shard, or the _StridedShard that FSDP puts before one of tensor parallelism
            splits[placement.dim].append((mesh.size(axis), coordinate[axis], getattr(placement, "split_factor", 1)))
    shard = Shard(shape, tuple(held_indices(size, own) for size, own in zip(shape, splits, strict=True)))
    held = tuple(param.to_local().shape)  # type: ignore[attr-defined]
    if held != shard.local_shape:
        raise ValueError(f"{placements} on the mesh {mesh.mesh_dim_names}: {held} is held of {shape}")
    return shard


def _nested(outer: Runs, size: int, runs: Runs) -> Runs:
    """The runs of ``runs`` (within a dimension of ``size``) for each index of ``outer``."""
    if runs == ((0, size),):
        return tuple((start * size, stop * size) for start, stop in outer)
    merged: list[Range] = []
    for first, last in outer:
        for index in range(first, last):
            for start, stop in runs:
                if merged and merged[-1][1] == index * size + start:
                    merged[-1] = (merged[-1][0], index * size + stop)
                else:
                    merged.append((index * size + start, index * size + stop))
    return tuple(merged)
