"""A parameter is not a matrix: how a parameter's elements are read as the matrices Muon orthogonalises."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
        extents, strides: How the piece lies there. Two dimensions, ``(rows, cols)``; three where other matrices'
            rows or columns lie between its own: ``(runs, rows, cols)`` or ``(rows, runs, cols)``.
    """

    key: MatrixKey
    shape: tuple[int, int]
    rows: tuple[int, int]
    cols: tuple[int, int]
    offset: int
    extents: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def rectangle(self) -> tuple[MatrixKey, tuple[int, int], tuple[int, int]]:
        """What it is a piece of, and which; equal for processes that hold copies."""
        return self.key, self.rows, self.cols

    @property
    def size(self) -> tuple[int, int]:
        """Its rows and columns."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    def view(self, flat: Tensor) -> Tensor:
        """``extents``, as a view of the contiguous run of elements that holds it. In this order of the elements it can
        be reshaped to ``size``."""
        return flat.as_strided(self.extents, self.strides, flat.storage_offset() + self.offset)


@dataclass(frozen=True)
class MatrixBlock:
    """A contiguous run of a parameter's elements that holds whole matrices: the smallest piece a rank can own.

    Attributes:
        start, stop: The run of elements, counted over the flattened parameter.
        rows: Of the run, read as one 2-D tensor.
        shapes: Rows and columns of each matrix in it.
        index: Number of the run's first matrix within the parameter.
    """

    start: int
    stop: int
    rows: int
    shapes: tuple[tuple[int, int], ...]
    index: int


@dataclass(frozen=True)
class _Runs:
    """Rows, or columns, of a matrix: ``first`` to ``last`` of its own, found as ``count`` equal runs, the first one at
    ``at``, each ``step`` behind the one before."""

    first: int
    last: int
    at: int
    count: int = 1
    step: int = 0


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
        interleaved: In how many equal runs each of ``sizes`` lies in the parameter: the first run of every matrix,
            then the second of every matrix, …; 1 for matrices that lie one after the other.
    """

    stack: int
    rows: int
    cols: int
    dim: int
    sizes: tuple[int, ...]
    transposed: bool = False
    interleaved: int = 1

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
        interleaved: int = 1,
    ) -> MatrixLayout:
        """Cut the output side of each matrix into blocks, and each block into heads.

        Args:
            stack, rows, cols: The parameter's shape, as stored.
            split_sizes: Sizes of fused blocks along the output features (q, k, v of a fused projection, say).
            num_heads: Heads in every block, or one number per block; each head becomes a matrix of its own.
            transposed: Output features are the columns, not the rows.
            interleaved: In how many runs each block is dealt out: heads of GPT-NeoX, say.

        Raises:
            ValueError: The sizes do not sum to the output features, or the heads or the runs do not divide them.
        """
        features = cols if transposed else rows
        blocks = tuple(split_sizes) if split_sizes else (features,)
        if sum(blocks) != features or min(blocks) < 1:
            raise ValueError(f"split_sizes={blocks} must be positive and sum to the {features} output features.")
        if isinstance(interleaved, bool) or not isinstance(interleaved, int) or interleaved < 1:
            raise ValueError(f"interleaved={interleaved!r} must be a positive integer.")
        if interleaved > 1 and len(blocks) == 1:
            raise ValueError(f"interleaved={interleaved} deals out several blocks: say their sizes, split_sizes=(...).")
        if any(block % interleaved for block in blocks):
            raise ValueError(f"interleaved={interleaved} must divide each block of sizes {blocks}.")
        heads = (num_heads or 1,) * len(blocks) if not isinstance(num_heads, Sequence) else tuple(num_heads)
        if len(heads) != len(blocks) or any(h < 1 or b % h for b, h in zip(blocks, heads, strict=False)):
            raise ValueError(f"num_heads={num_heads} must give one divisor for each block of sizes {blocks}.")
        dim, whole = 1 if transposed else 0, set(heads) == {1}
        if not whole and any(h % interleaved for h in heads):
            raise ValueError(f"num_heads={num_heads}: the {interleaved} runs of each block must hold whole heads.")
        of_a_run = tuple(b // h for b, h in zip(blocks, heads, strict=True) for _ in range(max(1, h // interleaved)))
        if whole:
            return cls(stack, rows, cols, dim, of_a_run, transposed, interleaved)
        return cls(stack, rows, cols, dim, of_a_run * interleaved, transposed)

    @property
    def num_matrices(self) -> int:
        """How many matrices the parameter holds."""
        return self.stack * len(self.sizes)

    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each matrix."""
        return tuple(shape for block in self.blocks() for shape in block.shapes)

    def blocks(self) -> Iterator[MatrixBlock]:
        """The contiguous pieces, in the order of the parameter's elements, covering all of them."""
        if self.dim == 1:
            pieces = [(self.rows, tuple((self.rows, size) for size in self.sizes))]
        elif self.interleaved > 1:
            pieces = [(self.rows, tuple((size, self.cols) for size in self.sizes))]
        else:
            pieces = [(size, ((size, self.cols),)) for size in self.sizes]
        start = index = 0
        for _ in range(self.stack):
            for rows, shapes in pieces:
                stop = start + rows * self.cols
                yield MatrixBlock(start, stop, rows, shapes, index)
                start, index = stop, index + len(shapes)

    def matrices(self, param: Tensor) -> list[Tensor]:
        """The matrices of a parameter, ``(rows, cols)`` each, as views where its elements lie in order."""
        flat = param.detach().reshape(-1)
        return [part.view(flat).reshape(part.size) for part in self.parts("", [(0, self.stack * self.rows)])]

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
        across = self._cut(1, first, last)
        for start, stop in row_runs:
            for top, block in itertools.islice(blocks, bisect.bisect_right(bottoms, start), None):
                if top >= stop:
                    break
                upper, lower = max(start, top), min(stop, top + block.rows)
                place = filled + top - start  # of the block's first row, held or not
                down = self._cut(0, upper - top, lower - top)
                for number, shape in enumerate(block.shapes):
                    for r, c in itertools.product(down[number % len(down)], across[number % len(across)]):
                        parts.append(_part((name, block.index + number), shape, r, c, place, width, first))
            filled += stop - start
        return parts

    def _cut(self, dim: int, first: int, last: int) -> list[list[_Runs]]:
        """What of each matrix of a block lies between two of the block's rows (``dim`` 0) or columns."""
        if dim != self.dim or (dim == 0 and self.interleaved == 1):  # a block of rows is one matrix then
            return [[_Runs(first, last, first)] if first < last else []]
        widths = [size // self.interleaved for size in self.sizes]
        lefts = itertools.accumulate(widths, initial=0)
        return [
            list(_runs_between(left, width, sum(widths), self.interleaved, first, last))
            for left, width in zip(lefts, widths, strict=False)
        ]

    def describe(self) -> str:
        """The matrices in words: ``8 x (64, 128)``."""
        kinds: dict[tuple[int, int], int] = {}
        for size in self.sizes:
            shape = (size, self.cols) if self.dim == 0 else (self.rows, size)
            kinds[shape] = kinds.get(shape, 0) + self.stack
        words = ", ".join(f"{count} x {shape}" if count > 1 else f"{shape}" for shape, count in kinds.items())
        return words + (f" interleaved in {self.interleaved} runs" if self.interleaved > 1 else "")


def _runs_between(left: int, width: int, period: int, count: int, first: int, last: int) -> Iterator[_Runs]:
    """Of ``count`` runs ``[left + n·period, left + n·period + width)``, what lies in ``[first, last)``: those that do
    as a whole, together; and what the edges cut."""
    begin = min(count, max(0, -((left - first) // period)))  # the first run that starts in it
    end = min(count, max(0, (last - left - width) // period + 1))  # the first one that does not end in it
    if begin < end:
        yield _Runs(begin * width, end * width, begin * period + left, end - begin, period)
    for number in sorted({begin - 1, end}):
        if 0 <= number < count and not begin <= number < end:
            start = number * period + left
            low, high = max(first, start), min(last, start + width)
            if low < high:
                yield _Runs(number * width + low - start, number * width + high - start, low)


def _part(
    key: MatrixKey, shape: tuple[int, int], rows: _Runs, cols: _Runs, top: int, width: int, left: int
) -> MatrixPart:
    """A part in a table of ``width`` columns, the block's first row being its row ``top``, its column 0 column
    ``left``."""
    height, breadth = (rows.last - rows.first) // rows.count, (cols.last - cols.first) // cols.count
    extents: tuple[int, ...] = (height, breadth)
    strides: tuple[int, ...] = (width, 1)
    if rows.count > 1:
        extents, strides = (rows.count, *extents), (rows.step * width, *strides)
    if cols.count > 1:
        extents, strides = (height, cols.count, breadth), (width, cols.step, 1)
    offset = (top + rows.at) * width + cols.at - left
    return MatrixPart(key, shape, (rows.first, rows.last), (cols.first, cols.last), offset, extents, strides)
