"""Which parameter goes to Muon, as which matrices, and which to AdamW: ordered rules, the first match wins."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from lightning_muon.hugging_face import Fused, fused_projection, fused_stack
from lightning_muon.matrices import MatrixLayout

__all__ = ["Candidate", "Route", "Rule", "mark", "route"]

Algorithm = Literal["muon", "adamw"]
_MARK = "_lightning_muon_mark"


@dataclass(frozen=True)
class Rule:
    """A user's rule, tried before the built-in ones.

    Args:
        pattern: Regular expression, searched for anywhere in the parameter's name (``"qkv"`` is in
            ``layers.0.qkv.weight``; ``r"qkv\\.weight$"`` says it exactly). A rule for Muon passes over vectors.
        algorithm: ``"muon"`` or ``"adamw"``.
        split_sizes: Sizes of the matrices fused along the output features, for example ``(q, k, v)``.
        num_heads: Heads per block, to orthogonalise each head by itself; one number, or one per block.
        transposed: The parameter is stored ``(in, out)``, not ``(out, in)`` as ``torch.nn.Linear`` does. Known by
            itself for transposed convolutions, GPT-2's Conv1D and the experts of `transformers`.
        interleaved: In how many runs each matrix of ``split_sizes`` lies in the parameter: the first run of every one,
            then the second of every one, …. GPT-NeoX has q, k and v of one head before those of the next:
            ``split_sizes=(d, d, d), interleaved=num_heads``.
    """

    pattern: str
    algorithm: Algorithm = "muon"
    split_sizes: Sequence[int] | None = None
    num_heads: int | Sequence[int] | None = None
    transposed: bool = False
    interleaved: int = 1

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"lm.Rule({self.pattern!r}) is no regular expression: {error}") from None
        _check_algorithm(self.algorithm)

    def matches(self, names: Iterable[str]) -> bool:
        """Whether the pattern is found in one of a parameter's names."""
        return any(re.search(self.pattern, name) for name in names)


@dataclass(frozen=True)
class Route:
    """The decision on one parameter.

    Attributes:
        algorithm: ``"muon"`` or ``"adamw"``.
        rule: The rule that decided.
        layout: The matrices it is made of: what Muon orthogonalises, and what the monitors look at under AdamW too.
            ``None`` for a vector.
    """

    algorithm: Algorithm
    rule: str
    layout: MatrixLayout | None = None


@dataclass(frozen=True)
class Candidate:
    """What the rules may look at.

    Attributes:
        names: Every name of the parameter; several if it is tied.
        param: The parameter.
        modules: The module that owns it, for each name; empty when only names were given.
        parents: The modules that hold those.
    """

    names: tuple[str, ...]
    param: nn.Parameter
    modules: tuple[nn.Module, ...] = ()
    parents: tuple[nn.Module, ...] = ()

    def owned_by(self, *types: type[nn.Module]) -> bool:
        """Whether a module of one of these types owns the parameter."""
        return any(isinstance(module, types) for module in self.modules)

    def in_module_named(self, names: frozenset[str]) -> bool:
        """Whether the module that owns the parameter has one of these names (``lm_head`` in ``a.lm_head.weight``)."""
        return any(len(parts) > 1 and parts[-2] in names for parts in (n.lower().split(".") for n in self.names))


def mark(
    param: nn.Parameter,
    algorithm: Algorithm = "muon",
    *,
    split_sizes: Sequence[int] | None = None,
    num_heads: int | Sequence[int] | None = None,
    transposed: bool = False,
    interleaved: int = 1,
) -> nn.Parameter:
    """Tell Muon about a parameter where the model is written. ``copy.deepcopy`` of a parameter drops the mark.

    Args:
        param: The parameter.
        algorithm: ``"muon"`` or ``"adamw"``.
        split_sizes: See ``Rule``.
        num_heads: See ``Rule``.
        transposed: See ``Rule``.
        interleaved: See ``Rule``.

    Returns:
        ``param``, marked.
    """
    options = {
        "algorithm": algorithm,
        "split_sizes": split_sizes,
        "num_heads": num_heads,
        "transposed": transposed,
        "interleaved": interleaved,
    }
    _check_algorithm(algorithm)
    setattr(param, _MARK, options)
    return param


def route(candidate: Candidate, rules: Iterable[Rule] = (), group: Mapping[str, Any] | None = None) -> Route:
    """Decide on one parameter: its group's options, its mark, the user's rules, then the built-in rules.

    Raises:
        ValueError: No rule covers the parameter, or the options do not fit its shape.
    """
    decision = _decide(candidate, rules, group or {})
    if decision.algorithm == "adamw":
        return replace(decision, layout=_reading(candidate))
    return decision


def _decide(candidate: Candidate, rules: Iterable[Rule], group: Mapping[str, Any]) -> Route:
    if group.get("algorithm") is not None:
        return _as_told(candidate, "group option", group)
    marked = getattr(candidate.param, _MARK, None)
    if marked is not None:
        return _as_told(candidate, "marked", marked)
    for rule in rules:
        if rule.algorithm == "muon" and candidate.param.ndim < 2:
            continue  # the bias beside a weight that the rule is about
        if rule.matches(candidate.names):
            return _as_told(candidate, f"rule {rule.pattern!r}", vars(rule))
    if group.get("split_sizes") or group.get("num_heads") or group.get("transposed"):
        return _as_told(candidate, "group option", {**group, "algorithm": "muon"})
    for built_in in _BUILT_IN:
        decision = built_in(candidate)
        if decision is not None:
            return decision
    is_fused = any(fused in name for name in candidate.names for fused in _FUSED_GATE_UP_NAMES)
    fused = (
        "; this one is fused: say split_sizes, and transposed=True if it is stored (stack, in, out). Experts of"
        " transformers' models need no rule where Muon is given the model, and not a list of parameters"
    )
    raise ValueError(
        f"No rule says how to train {candidate.names[0]!r} of shape {tuple(candidate.param.shape)}. Add"
        f" lm.Rule({re.escape(candidate.names[0])!r}, algorithm='muon' or 'adamw') to `rules`: 'muon' reads a"
        f" parameter of three dimensions as a stack of matrices (stack, rows, cols){fused if is_fused else ''}."
    )


def _check_algorithm(algorithm: str) -> None:
    if algorithm not in ("muon", "adamw"):
        raise ValueError(f"algorithm={algorithm!r} is not known; choose 'muon' or 'adamw'.")


def _as_told(candidate: Candidate, rule: str, options: Mapping[str, Any]) -> Route:
    algorithm = options["algorithm"]
    _check_algorithm(algorithm)
    if algorithm == "adamw":
        return Route("adamw", rule)
    try:
        return _muon(
            candidate,
            rule,
            split_sizes=options.get("split_sizes"),
            num_heads=options.get("num_heads"),
            transposed=options.get("transposed", False),
            interleaved=options.get("interleaved", 1),
        )
    except ValueError as error:
        raise ValueError(f"{candidate.names[0]!r} of shape {tuple(candidate.param.shape)}, {rule}: {error}") from None


def _muon(
    candidate: Candidate,
    rule: str,
    *,
    split_sizes: Sequence[int] | None = None,
    num_heads: int | Sequence[int] | None = None,
    transposed: bool = False,
    interleaved: int = 1,
    stacked: int = 1,
) -> Route:
    """Muon with the reading that the parameter's module and shape suggest."""
    shape = candidate.param.shape
    stack, rows, cols = 1, *shape[:1], 0
    if len(shape) < 2:
        raise ValueError("Muon needs a matrix; give this parameter algorithm='adamw'.")
    convolution = next((m for m in candidate.modules if isinstance(m, nn.modules.conv._ConvNd)), None)
    if convolution is not None:
        groups = convolution.groups
        stack, rows, cols = groups, shape[0] // groups, candidate.param.numel() // shape[0]
    elif len(shape) == 2:
        stack, rows, cols = stacked, shape[0] // stacked, shape[1]
    elif len(shape) == 3:
        stack, rows, cols = shape
    else:
        raise ValueError("Muon reads two or three dimensions; more only if they belong to a convolution.")
    layout = MatrixLayout.create(
        stack,
        rows,
        cols,
        split_sizes=split_sizes,
        num_heads=num_heads,
        transposed=transposed or _is_transposed(candidate) or bool(convolution and convolution.transposed),
        interleaved=interleaved,
    )
    return Route("muon", rule, layout)


def _is_transposed(candidate: Candidate) -> bool:
    """``transformers``' Conv1D (GPT-2) is a Linear that stores ``(in, out)``; known by name, not to depend on it."""
    return any(type(module).__name__ == "Conv1D" for module in candidate.modules)


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
    decision = _muon(candidate, "convolution")
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
            fused = fused_projection(parts[-2], parent, param.shape[1 if _is_transposed(candidate) else 0])
        if fused is None:
            fused = fused_stack(parts[-1], owner, parent, tuple(param.shape))
        return None if fused is None else _as_fused(candidate, fused)
    except ValueError as error:
        raise ValueError(f"{name!r} of shape {tuple(param.shape)}: {error}") from None


def _as_fused(candidate: Candidate, fused: Fused) -> Route:
    return _muon(
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
            _muon(candidate, "fused q, k, v", split_sizes=(param.shape[0] // 3,) * 3)
            if _is_in_proj(candidate)
            else None
        )
    if candidate.owned_by(nn.LSTM, nn.GRU):
        gates = 4 if candidate.owned_by(nn.LSTM) else 3
        projection = any(name.rpartition(".")[2].startswith("weight_hr") for name in candidate.names)
        return None if projection else _muon(candidate, "fused gates", split_sizes=(param.shape[0] // gates,) * gates)
    features, inputs = reversed(param.shape) if _is_transposed(candidate) else param.shape
    if candidate.in_module_named(_FUSED_GATE_UP_NAMES) and features % 2 == 0:
        return _muon(candidate, "fused gate, up", split_sizes=(features // 2,) * 2)
    if candidate.in_module_named(_FUSED_QKV_NAMES):
        if features == 3 * inputs:
            return _muon(candidate, "fused q, k, v", split_sizes=(inputs,) * 3)
        return _muon(candidate, "fused, sizes unknown: one matrix (say split_sizes)")
    if candidate.in_module_named(_FUSED_IN_SOME_ORDER):
        return _muon(candidate, "fused, order unknown: one matrix (say split_sizes, interleaved)")
    return None


def _is_in_proj(candidate: Candidate) -> bool:
    return any(name.rpartition(".")[2] == "in_proj_weight" for name in candidate.names)


def _matrix(candidate: Candidate) -> Route | None:
    return _muon(candidate, "matrix") if candidate.param.ndim == 2 else None


def _expert_stack(candidate: Candidate) -> Route | None:
    if candidate.param.ndim != 3 or not any("expert" in name.lower() for name in candidate.names):
        return None
    if any(fused in name for name in candidate.names for fused in _FUSED_GATE_UP_NAMES):
        return None  # which half of which dimension is the gate cannot be seen: the user has to say
    return _muon(candidate, "stack of experts")


_BUILT_IN: tuple[Callable[[Candidate], Route | None], ...] = (
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


def _reading(candidate: Candidate) -> MatrixLayout | None:
    """The matrices of a parameter that AdamW trains."""
    if _vector(candidate) or _elementwise(candidate):
        return None
    decisions = (built_in(candidate) for built_in in (_convolution, _known_fused, _fused, _matrix, _expert_stack))
    return next((decision.layout for decision in decisions if decision and decision.layout), None)
