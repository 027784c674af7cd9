"""Whether a sequence stays in its range when rounding puts a singular value above 1."""

from __future__ import annotations

from functools import lru_cache

import torch

from lightning_muon.orthogonalize.sequence import PolynomialSequence

__all__ = ["check_range", "needed_head_room", "unit_roundoff"]


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding: half of ``torch.finfo(dtype).eps``."""
    return torch.finfo(dtype).eps / 2


def needed_head_room(dtype: torch.dtype) -> float:
    """How large a normalised singular value may come out of one rounding each of input, Gram matrix and norm."""
    return 1 + 3 * unit_roundoff(dtype)


@lru_cache(maxsize=256)
def check_range(sequence: PolynomialSequence, dtype: torch.dtype) -> None:
    """Raise if the sequence can turn a direction around or blow it up in this precision.

    Args:
        sequence: Any.
        dtype: Of the iteration.

    Raises:
        ValueError: The output of a singular value that can occur is negative or above 2.
    """
    room, needed = sequence.head_room(), needed_head_room(dtype)
    if room <= 1:
        culprit = sequence.first_unsafe()
        raise ValueError(
            f"The polynomial sequence {sequence.name!r} does not keep a normalised singular value of {culprit:.3g}"
            " between 0 and 2: updates would turn around or explode. Use one of lightning_muon.available_sequences(),"
            " or one that was made for inputs divided by their Frobenius norm."
        )
    if room < needed:
        raise ValueError(
            f"The polynomial sequence {sequence.name!r} keeps its outputs between 0 and 2 up to σ = {room:.6f} only,"
            f" and rounding in {dtype} reaches {needed:.6f}. Run it in a higher precision"
            " (orthogonalization_dtype=torch.float32), give a mapping a larger 'safety' (steps of your own:"
            " divide (a, b, c) of the first by (s, s³, s⁵), s = 1.02 say), or choose another."
        )
