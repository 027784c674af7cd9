"""The largest attention logit of each head. Pure arithmetic on tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["max_logits"]

# Logits at a time: 4 MiB of float32, which stay in a CPU's cache, or 256 MiB, few launches on an accelerator.
_CPU_ELEMENTS, _ACCELERATOR_ELEMENTS = 1 << 20, 1 << 26
# pieces of a causal triangle: seven sixteenths of the square are then left out
_CAUSAL_CHUNKS = 8
# an additive mask hides where it is this or less: e to that power is 0 in float64
_HIDDEN = -1e4


@torch.no_grad()
def max_logits(
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    chunk_elements: int | None = None,
) -> Tensor:
    """``S = max q·k·scale`` of each query head, over the batch and the pairs of positions that attention sees.

    In float32 at least, whatever autocast says, and in pieces. Of an additive mask only what it hides counts (-10⁴ or
    less), not what it adds: a clip of the weights does not change that.

    Args:
        query: ``(..., heads, queries, width)``.
        key: ``(..., key heads, keys, width)``; ``heads / key heads`` adjacent query heads share one.
        is_causal: Query i sees keys 0 … i, as in ``torch.nn.functional.scaled_dot_product_attention``.
        attn_mask: As there: boolean, true where a key is seen, or additive; broadcast to
            ``(..., heads, queries, keys)``.
        scale: ``None`` means ``1/√width``.
        chunk_elements: Logits that are in memory at a time, at most (or those of one query in one batch element);
            ``None`` takes what suits the device.

    Returns:
        ``(heads,)``; -∞ for a head that sees nothing, NaN where queries or keys have one.

    Raises:
        ValueError: The shapes do not go together.
    """
    if query.ndim < 3 or key.ndim != query.ndim or query.shape[-1] != key.shape[-1] or query.shape[-3] % key.shape[-3]:
        raise ValueError(
            f"max_logits: queries {tuple(query.shape)} and keys {tuple(key.shape)}; expected (..., heads, queries,"
            " width) and (..., key heads, keys, width), heads a multiple of key heads."
        )
    heads, num_queries, width = query.shape[-3:]
    num_keys = key.shape[-2]
    largest = query.new_full((heads,), -math.inf, dtype=torch.promote_types(query.dtype, torch.float32))
    if not query.numel() or not key.numel():
        return largest
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], num_keys).reshape(-1, heads, num_queries, num_keys)
    scale = 1 / math.sqrt(width) if scale is None else scale
    query, key = (x.detach().reshape(-1, *x.shape[-3:]) for x in (query, key))
    chunk_elements = chunk_elements or (_CPU_ELEMENTS if query.device.type == "cpu" else _ACCELERATOR_ELEMENTS)
    rows_at_once = max(1, chunk_elements // (heads * num_keys))
    rows_at_once = min(rows_at_once, -(-num_queries // _CAUSAL_CHUNKS) if is_causal else num_queries)
    examples_at_once = max(1, chunk_elements // (heads * num_keys * rows_at_once))
    with torch.autocast(query.device.type, enabled=False):
        for examples in _slices(len(query), examples_at_once):
            keys = key[examples].to(largest.dtype)
            for rows in _slices(num_queries, rows_at_once):
                # the keys behind the last query of a chunk are not seen by any
                cols = slice(min(rows.stop, num_keys) if is_causal else num_keys)
                logits = _products(query[examples, :, rows].to(largest.dtype) * scale, keys[:, :, cols])
                if attn_mask is not None:
                    seen = attn_mask[examples, :, rows, cols]
                    logits.masked_fill_(~seen if seen.dtype == torch.bool else seen <= _HIDDEN, -math.inf)
                if is_causal:
                    last = torch.arange(rows.start, rows.stop, device=query.device)
                    behind = torch.arange(logits.shape[-1], device=query.device) > last[:, None]
                    logits.masked_fill_(behind, -math.inf)
                largest = torch.maximum(largest, logits.amax((0, 2, 3)))
    return largest


def _products(query: Tensor, key: Tensor) -> Tensor:
    """``(batch, heads, queries, keys)``, without a copy of the keys for each query head that shares them."""
    heads, queries = query.shape[1:3]
    together = query.reshape(len(query), key.shape[1], -1, query.shape[3])
    return torch.matmul(together, key.mT).view(len(query), heads, queries, key.shape[2])


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
