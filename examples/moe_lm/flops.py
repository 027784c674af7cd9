"""Floating-point operations of a training step, for Lightning's ``ThroughputMonitor``."""

from __future__ import annotations

from torch import Tensor

from .config import ModelConfig


def flops_per_token(config: ModelConfig, seq_len: int, *, training: bool = True) -> int:
    """Operations for one of ``seq_len`` tokens, of the forward pass or, training, of forward and backward.

    Two for each multiply-add of a matrix product: ``2 * (active parameters that multiply)`` and, per layer,
    ``2 * seq_len * heads * (width of a key + width of a value)`` for attention; the backward pass does twice as much.
    Attention is counted whole, as in PaLM's convention and torch's ``FlopCounterMode``, though half of it is masked.
    Embedding lookup, norms and whatever else is elementwise are not counted, nor is a recomputed forward.
    """
    hidden, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    active = config.num_parameters(embeddings=False).active - _norms(config) + config.vocab_size * hidden  # the head
    if config.attention == "mla":
        key_and_value = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        key_and_value = 2 * config.head_dim
    forward = 2 * active + 2 * layers * seq_len * heads * key_and_value
    return 3 * forward if training else forward


def _norms(config: ModelConfig) -> int:
    """Parameters of the norms: these multiply no matrix."""
    per_layer = 2 * config.hidden_size
    if config.attention == "mla":
        per_layer += config.kv_lora_rank + (config.q_lora_rank or 0)
    return config.num_hidden_layers * per_layer + config.hidden_size


def num_windows(batch: Tensor) -> int:
    """``ThroughputMonitor``'s ``batch_size_fn`` for batches ``(windows, T+1)``."""
    return batch.shape[0]


def num_tokens(batch: Tensor) -> int:
    """``ThroughputMonitor``'s ``length_fn``: the tokens predicted in a batch ``(windows, T+1)``."""
    return batch.shape[0] * (batch.shape[1] - 1)
