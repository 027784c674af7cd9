"""A parameter is not a matrix: how a parameter's elements are read as the matrices Muon orthogonalises."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MatrixBlock", "MatrixKey", "MatrixLayout", "MatrixPart"]

MatrixKey = tuple[str, int]
"""A parameter's name, and the number of a matrix in it."""


@dataclass(frozen=True)
class MatrixPart:
    """The piece of a matrix that a process holds: a rectangle, usually all of it.

    Attributes:
        key: Which matrix.
        shape: The whole matrix.
        rows, cols: First and last plus one, within the matrix.
        offset: Where its first element lies in the flat run of elements that the process holds.
        stride: Elements of that run from one row to the next.
    """

    key: MatrixKey
    shape: tuple[int, int]
    rows: tuple[int, int]
    cols: tuple[int, int]
    offset: int
    stride: int

    @property
    def rectangle(self) -> tuple[MatrixKey, tuple[int, int], tuple[int, int]]:
        """What it is a piece of, and which; equal for processes that hold copies."""
        return self.key, self.rows, self.cols

    @property
    def size(self) -> tuple[int, int]:
        """Its rows and columns."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole matrix."""
        return self.size == self.shape

    def view(self, flat: Tensor) -> Tensor:
        """``(rows, cols)``, as a view of the contiguous run of elements that holds it."""
        return flat.as_strided(self.size, (self.stride, 1), flat.storage_offset() + self.offset)


@dataclass(frozen=True)
class MatrixBlock:
    """A contiguous run of a parameter's elements that holds whole matrices: the smallest piece a rank can own.

    Attributes:
        start, stop: The run of elements, counted over the flattened parameter.
        rows, cols: The run read as one 2-D tensor.
        cuts: Column counts of the matrices side by side in it; ``(cols,)`` for a single matrix.
        index: Number of the run's first matrix within the parameter.
    """

    start: int
    stop: int
    rows: int
    cols: int
    cuts: tuple[int, ...]
    index: int

    def views(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The matrices, each ``(rows, cut)``, as views of the flattened parameter."""
        block = flat[self.start : self.stop].view(self.rows, self.cols)
        return torch.split(block, list(self.cuts), dim=1)


@dataclass(frozen=True)
class MatrixLayout:
    """A parameter as ``stack`` matrices of ``rows x cols``, each cut along ``dim`` into matrices of ``sizes``.

    Attributes:
        stack: Leading independent matrices: experts, or the groups of a convolution.
        rows, cols: The 2-D shape of each, as stored.
        dim: What is cut: 0 for rows, 1 for columns.
        sizes: The extents of the cut; they sum to ``rows`` (``dim`` 0) or ``cols`` (``dim`` 1).
        transposed: The parameter is stored ``(in, out)`` and not ``(out, in)`` like ``torch.nn.Linear``; matters
            to the scales that tell rows from columns.
    """

    stack: int
    rows: int
    cols: int
    dim: int
    sizes: tuple[int, ...]
    transposed: bool = False

    @classmethod
    def create(
        cls,
        stack: int,
        rows: int,
        cols: int,
        *,
        split_sizes: Sequence[int] | None = None,
        num_heads: int | Sequence[int] | None = None,
        transposed: bool = False,
    ) -> MatrixLayout:
        """Cut the output side of each matrix into blocks, and each block into heads.

        Args:
            stack, rows, cols: The parameter's shape, as stored.
            split_sizes: Sizes of fused blocks along the output features (q, k, v of a fused projection, say).
            num_heads: Heads in every block, or one number per block; each head becomes a matrix of its own.
            transposed: Output features are the columns, not the rows.

        Raises:
            ValueError: The sizes do not sum to the output features, or the heads do not divide them.
        """
        features = cols if transposed else rows
        blocks = tuple(split_sizes) if split_sizes else (features,)
        if sum(blocks) != features or min(blocks) < 1:
            raise ValueError(f"split_sizes={blocks} must be positive and sum to the {features} output features.")
        heads = (num_heads or 1,) * len(blocks) if not isinstance(num_heads, Sequence) else tuple(num_heads)
        if len(heads) != len(blocks) or any(h < 1 or b % h for b, h in zip(blocks, heads, strict=False)):
            raise ValueError(f"num_heads={num_heads} must give one divisor for each block of sizes {blocks}.")
        sizes = tuple(b // h for b, h in zip(blocks, heads, strict=True) for _ in range(h))
        return cls(stack, rows, cols, 1 if transposed else 0, sizes, transposed)

    @property
    def num_matrices(self) -> int:
        """How many matrices the parameter holds."""
        return self.stack * len(self.sizes)

    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each matrix."""
        return tuple((block.rows, cut) for block in self.blocks() for cut in block.cuts)

    def blocks(self) -> Iterator[MatrixBlock]:
        """The contiguous pieces, in the order of the parameter's elements, covering all of them."""
        row_sizes = self.sizes if self.dim == 0 else (self.rows,)
        cuts = self.sizes if self.dim == 1 else (self.cols,)
        start = index = 0
        for _ in range(self.stack):
            for rows in row_sizes:
                stop = start + rows * self.cols
                yield MatrixBlock(start, stop, rows, self.cols, cuts, index)
                start, index = stop, index + len(cuts)

    def matrices(self, param: Tensor) -> list[Tensor]:
        """The matrices of a parameter, ``(rows, cols)`` each, as views where its elements lie in order."""
        flat = param.detach().reshape(-1)
        return [view for block in self.blocks() for view in block.views(flat)]

    def parts(
        self, name: str, row_runs: Sequence[tuple[int, int]], cols: tuple[int, int] | None = None
    ) -> list[MatrixPart]:
        """What of each matrix lies in a piece of the parameter, read as one table of ``stack · rows`` by ``cols``.

        Args:
            name: The parameter's.
            row_runs: The rows of the piece, ascending runs; packed one after the other in the process's memory.
            cols: The columns of the piece; ``None`` for all.
        """
        first, last = cols or (0, self.cols)
        width, parts, filled = last - first, [], 0
        blocks = [(block.start // self.cols, block) for block in self.blocks()]
        bottoms = [top + block.rows for top, block in blocks]
        for start, stop in row_runs:
            for top, block in itertools.islice(blocks, bisect.bisect_right(bottoms, start), None):
                if top >= stop:
                    break
                upper, lower = max(start, top), min(stop, top + block.rows)
                left = 0
                for place, cut in enumerate(block.cuts):
                    begin, end = max(first, left), min(last, left + cut)
                    if begin < end:
                        offset = (filled + upper - start) * width + begin - first
                        rows, columns = (upper - top, lower - top), (begin - left, end - left)
                        key = (name, block.index + place)
                        parts.append(MatrixPart(key, (block.rows, cut), rows, columns, offset, width))
                    left += cut
            filled += stop - start
        return parts

    def describe(self) -> str:
        """The matrices in words: ``8 x (64, 128)``."""
        kinds: dict[tuple[int, int], int] = {}
        for size in self.sizes:
            shape = (size, self.cols) if self.dim == 0 else (self.rows, size)
            kinds[shape] = kinds.get(shape, 0) + self.stack
        return ", ".join(f"{count} x {shape}" if count > 1 else f"{shape}" for shape, count in kinds.items())
