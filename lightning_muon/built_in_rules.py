"""The rules that need no user: what modules, names and shapes say of a parameter. The first that knows decides."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from lightning_muon.hugging_face import Fused, fused_projection, fused_stack
from lightning_muon.matrices import MatrixLayout
from lightning_muon.routes import Candidate, Route, is_transposed, muon_route

__all__ = ["BUILT_IN", "is_named_fused", "reading"]

_EMBEDDING_NAME = re.compile(
    r"(^|[._])(embed|embedding|embeddings|wte|wpe|pos_emb|pos_embed|embed_tokens)([._]|$)", re.IGNORECASE
)
_HEAD_NAMES = frozenset(
    {
        "lm_head",
        "output",
        "head",
        "classifier",
        "unembed",
        "unembedding",
        "embed_out",
        "logits",
        "to_logits",
        "proj_out",
    }
)
_FUSED_QKV_NAMES = frozenset({"qkv", "qkv_proj", "wqkv", "c_attn", "in_proj"})
_FUSED_IN_SOME_ORDER = frozenset({"query_key_value"})  # by heads, by groups of heads or in three pieces
_FUSED_GATE_UP_NAMES = frozenset({"gate_up_proj", "w13"})


def _embedding(candidate: Candidate) -> Route | None:
    if candidate.owned_by(nn.Embedding, nn.EmbeddingBag):
        return Route("adamw", "embedding")
    if candidate.owned_by(nn.Linear, nn.modules.conv._ConvNd):
        return None  # a projection, whatever it is called
    # the parameter itself (pos_embed) or its module (embed_tokens.weight), where no type tells
    ends = (".".join(name.split(".")[-2:]) for name in candidate.names)
    return Route("adamw", "embedding") if any(_EMBEDDING_NAME.search(end) for end in ends) else None


def _output_head(candidate: Candidate) -> Route | None:
    in_a_block = any(part.isdigit() for name in candidate.names for part in name.split("."))
    is_head = candidate.in_module_named(_HEAD_NAMES) and not in_a_block  # layers.3.attention.output is none
    return Route("adamw", "output head") if is_head else None


def _vector(candidate: Candidate) -> Route | None:
    shape = candidate.param.shape
    is_vector = len(shape) < 2 or candidate.param.numel() <= max(shape)
    return Route("adamw", "vector") if is_vector else None


_ELEMENTWISE_NAMES = frozenset({"bias", "scale", "A_log"})  # A_log: decay rates of a state-space model


def _elementwise(candidate: Candidate) -> Route | None:
    """What is added or multiplied element by element, though of two dimensions: the biases of stacked experts, say."""
    leaf = candidate.names[0].rpartition(".")[2]
    is_elementwise = leaf in _ELEMENTWISE_NAMES or leaf.endswith("_bias")
    return Route("adamw", "element by element") if is_elementwise else None


def _convolution(candidate: Candidate) -> Route | None:
    if not candidate.owned_by(nn.modules.conv._ConvNd):
        return None
    decision = muon_route(candidate, "convolution")
    assert decision.layout is not None
    if min(decision.layout.rows, decision.layout.cols) == 1:
        return Route("adamw", "depthwise convolution")
    return decision


def _known_fused(candidate: Candidate) -> Route | None:
    """Fused projections and stacks whose module's class says how they are cut."""
    param, (name, *_) = candidate.param, candidate.names
    if not candidate.modules or param.ndim not in (2, 3):
        return None
    parts, owner, parent = name.split("."), candidate.modules[0], next(iter(candidate.parents), None)
    try:
        fused = None
        if param.ndim == 2 and parent is not None and parts[-1] == "weight" and len(parts) > 1:
            fused = fused_projection(parts[-2], parent, param.shape[1 if is_transposed(candidate) else 0])
        if fused is None:
            fused = fused_stack(parts[-1], owner, parent, tuple(param.shape))
        return None if fused is None else _as_fused(candidate, fused)
    except ValueError as error:
        raise ValueError(f"{name!r} of shape {tuple(param.shape)}: {error}") from None


def _as_fused(candidate: Candidate, fused: Fused) -> Route:
    return muon_route(
        candidate,
        fused.what,
        split_sizes=fused.split_sizes or None,
        transposed=fused.transposed,
        interleaved=fused.interleaved,
        stacked=fused.stack,
    )


def _fused(candidate: Candidate) -> Route | None:
    """Fused projections whose blocks the shape gives away; others stay one matrix, and ``explain()`` says so."""
    param = candidate.param
    if param.ndim != 2:
        return None
    if candidate.owned_by(nn.MultiheadAttention):
        return (
            muon_route(candidate, "fused q, k, v", split_sizes=(param.shape[0] // 3,) * 3)
            if _is_in_proj(candidate)
            else None
        )
    if candidate.owned_by(nn.LSTM, nn.GRU):
        gates = 4 if candidate.owned_by(nn.LSTM) else 3
        projection = any(name.rpartition(".")[2].startswith("weight_hr") for name in candidate.names)
        return (
            None if projection else muon_route(candidate, "fused gates", split_sizes=(param.shape[0] // gates,) * gates)
        )
    features, inputs = reversed(param.shape) if is_transposed(candidate) else param.shape
    if candidate.in_module_named(_FUSED_GATE_UP_NAMES) and features % 2 == 0:
        return muon_route(candidate, "fused gate, up", split_sizes=(features // 2,) * 2)
    if candidate.in_module_named(_FUSED_QKV_NAMES):
        if features == 3 * inputs:
            return muon_route(candidate, "fused q, k, v", split_sizes=(inputs,) * 3)
        return muon_route(candidate, "fused, sizes unknown: one matrix (say split_sizes)")
    if candidate.in_module_named(_FUSED_IN_SOME_ORDER):
        return muon_route(candidate, "fused, order unknown: one matrix (say split_sizes, interleaved)")
    return None


def _is_in_proj(candidate: Candidate) -> bool:
    return any(name.rpartition(".")[2] == "in_proj_weight" for name in candidate.names)


def _matrix(candidate: Candidate) -> Route | None:
    return muon_route(candidate, "matrix") if candidate.param.ndim == 2 else None


def _expert_stack(candidate: Candidate) -> Route | None:
    if candidate.param.ndim != 3 or not any("expert" in name.lower() for name in candidate.names):
        return None
    if is_named_fused(candidate):
        return None  # which half of which dimension is the gate cannot be seen: the user has to say
    return muon_route(candidate, "stack of experts")


BUILT_IN: tuple[Callable[[Candidate], Route | None], ...] = (
    _embedding,
    _output_head,
    _vector,
    _elementwise,
    _convolution,
    _known_fused,
    _fused,
    _matrix,
    _expert_stack,
)


def reading(candidate: Candidate) -> MatrixLayout | None:
    """The matrices of a parameter that AdamW trains."""
    if _vector(candidate) or _elementwise(candidate):
        return None
    decisions = (built_in(candidate) for built_in in (_convolution, _known_fused, _fused, _matrix, _expert_stack))
    return next((decision.layout for decision in decisions if decision and decision.layout), None)


def is_named_fused(candidate: Candidate) -> bool:
    """Whether a parameter's name says that gate and up are in one."""
    return any(fused in name for name in candidate.names for fused in _FUSED_GATE_UP_NAMES)
