"""Which way to run an iteration: in which precision, by which products, one by one or as a batch.

By rules of shape, precision and device alone, so that every process and every resumed run decides the same.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from lightning_muon.orthogonalize.gram import gram_newton_schulz, gram_newton_schulz_flops, restarts
from lightning_muon.orthogonalize.newton_schulz import newton_schulz, newton_schulz_flops
from lightning_muon.orthogonalize.sequence import PolynomialSequence
from lightning_muon.orthogonalize.telemetry import Probe

__all__ = ["default_dtype", "default_dtype_of", "iterate", "orthogonalization_flops", "uses_gram"]

# elementwise passes and smaller products make Gram's operations a little dearer
_GRAM_MARGIN = 0.95
# short sides from which on a CPU runs matrices faster one by one than as a batch (benchmarks/orthogonalization.py)
_ALONE_FROM = {2: 257, 4: 128, 8: 128}
_BFLOAT16_FROM = 128


def default_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the iteration where none is asked for.

    float64 for float64 input. On CUDA float16, which has bfloat16's speed and an eighth of its rounding error;
    singular values are of order 1, so that its range suffices. On a CPU with bfloat16 instructions
    bfloat16 from a short side of 128 on, where it pays; otherwise float32.
    """
    return default_dtype_of(x.dtype, x.device, min(x.shape[-2:], default=0))


def default_dtype_of(dtype: torch.dtype, device: torch.device, short: int) -> torch.dtype:
    """The same for matrices of a dtype, on a device, with this shorter side."""
    if dtype == torch.float64:
        return torch.float64
    if device.type == "cuda":
        return torch.float16
    is_fast = device.type == "cpu" and short >= _BFLOAT16_FROM and _has_fast_bfloat16()
    return torch.bfloat16 if is_fast else torch.float32


@lru_cache(maxsize=1)
def _has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AMX or AVX512-BF16); torch has no public question for it."""
    questions = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(question() for question in questions if question is not None)


def iterate(x: Tensor, sequence: PolynomialSequence, probe: Probe | None = None) -> Tensor:
    """Run a sequence on wide matrices.

    Args:
        x: ``(batch, rows, cols)``, ``rows <= cols``, divided by their Frobenius norms, in the dtype of the iteration;
            left untouched.
        sequence: What to apply.
        probe: Sees the first and the last ``XXᵀ``.

    Returns:
        ``(batch, rows, cols)``, new memory.
    """
    if not _runs_alone(x):
        return _run(x, sequence, probe)
    if x.shape[0] == 1:
        return _run(x[0], sequence, probe).unsqueeze(0)
    result = torch.empty_like(x)
    for matrix, target in zip(x, result, strict=True):
        target.copy_(_run(matrix, sequence, probe))
    return result


def _runs_alone(x: Tensor) -> bool:
    return x.shape[0] == 1 or (x.device.type == "cpu" and x.shape[1] >= _ALONE_FROM[x.element_size()])


def _run(x: Tensor, sequence: PolynomialSequence, probe: Probe | None) -> Tensor:
    if sequence.norm == "schatten4" and x.dtype == torch.float16:
        # most of XXᵀ would be subnormal; a power of two costs no rounding, and the norm takes it out again
        x = x * 2.0 ** round(math.log2(x.shape[-2]) / 4)
    gram = x @ x.mT
    if probe is not None:
        probe.first(gram)
    if sequence.norm == "schatten4":
        precise = torch.promote_types(gram.dtype, torch.float32)
        norm = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True, dtype=precise).sqrt()
        scale = torch.where(norm == 0, 1.0, 1 / (norm * sequence.safety))
        x, gram = (x * scale).to(x.dtype), (gram * scale.square()).to(x.dtype)
    if uses_gram(*x.shape[-2:], sequence, x.dtype):
        return gram_newton_schulz(x, gram, sequence.steps, restarts(sequence, x.dtype), probe)
    return newton_schulz(x, gram, sequence.steps, probe)


@lru_cache(maxsize=4096)
def uses_gram(short: int, long: int, sequence: PolynomialSequence, dtype: torch.dtype) -> bool:
    """Whether the Gram iteration, with the restarts this precision needs, has fewer operations."""
    gram = gram_newton_schulz_flops(short, long, sequence.steps, restarts(sequence, dtype))
    return gram < _GRAM_MARGIN * newton_schulz_flops(short, long, sequence.steps)


def orthogonalization_flops(
    rows: int, cols: int, sequence: PolynomialSequence | None, dtype: torch.dtype = torch.float32
) -> int:
    """Floating-point operations (two per multiply-add) of orthogonalising one ``(rows, cols)`` matrix.

    The iteration is counted exactly, product by product; ``"exact"`` (``None``) as 20 products' worth of
    ``short² · long``, an order of magnitude for a decomposition.

    Args:
        rows: Of the matrix.
        cols: Of the matrix.
        sequence: What is run.
        dtype: Of the iteration, which decides how often the Gram iteration restarts.
    """
    short, long = sorted((rows, cols))
    if sequence is None:
        return 40 * short**2 * long
    if uses_gram(short, long, sequence, dtype):
        return gram_newton_schulz_flops(short, long, sequence.steps, restarts(sequence, dtype))
    return newton_schulz_flops(short, long, sequence.steps)
