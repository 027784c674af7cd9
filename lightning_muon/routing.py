"""Which parameter goes to Muon, as which matrices, and which to AdamW: ordered rules, the first match wins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_muon.built_in_rules import BUILT_IN, is_named_fused, reading
from lightning_muon.routes import Algorithm, Candidate, Route, muon_route

__all__ = ["Rule", "mark", "route"]

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
        return replace(decision, layout=reading(candidate))
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
    if (
        any(group.get(option) for option in ("split_sizes", "num_heads", "transposed"))
        or group.get("interleaved", 1) != 1
    ):
        return _as_told(candidate, "group option", {**group, "algorithm": "muon"})
    for built_in in BUILT_IN:
        decision = built_in(candidate)
        if decision is not None:
            return decision
    advice = (
        "; this one is fused: say split_sizes, and transposed=True if it is stored (stack, in, out). Experts of"
        " transformers' models need no rule where Muon is given the model, and not a list of parameters"
        if is_named_fused(candidate)
        else ""
    )
    raise ValueError(
        f"No rule says how to train {candidate.names[0]!r} of shape {tuple(candidate.param.shape)}. Add"
        f" lm.Rule({re.escape(candidate.names[0])!r}, algorithm='muon' or 'adamw') to `rules`: 'muon' reads a"
        f" parameter of three dimensions as a stack of matrices (stack, rows, cols){advice}."
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
        return muon_route(
            candidate,
            rule,
            split_sizes=options.get("split_sizes"),
            num_heads=options.get("num_heads"),
            transposed=options.get("transposed", False),
            interleaved=options.get("interleaved", 1),
        )
    except ValueError as error:
        raise ValueError(f"{candidate.names[0]!r} of shape {tuple(candidate.param.shape)}, {rule}: {error}") from None
