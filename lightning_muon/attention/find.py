"""Attention modules in a model: those whose projections have the usual names, and those that the user describes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_muon.arguments import check_pattern
from lightning_muon.attention.heads import AttentionHeads, DescribeHeads
from lightning_muon.names import canonical_name

__all__ = ["Attention", "find_attention", "require_clippable"]

# q_norm, query_layernorm, k_ln, qk_norm, norm_k; q_a_layernorm is of what is compressed, before the projection
_QUERY_AND_KEY_NORM = re.compile(
    r"^(qk?|k|query|key)_?(layer_?norm|rms_?norm|norm|ln)$|^(layer_?norm|norm|ln)_(qk?|k|query|key)$"
)
_NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_NUM_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


@dataclass(frozen=True)
class Attention:
    """An attention module.

    Attributes:
        name: Its name in the model, without wrappers.
        module: The module.
        heads: Its heads.
    """

    name: str
    module: nn.Module
    heads: AttentionHeads

    def projections(self) -> dict[str, nn.Module]:
        """Those with rows of heads, by name."""
        names = dict.fromkeys(own.projection for head in self.heads.rows for own in head)
        return {name: self.module.get_submodule(name) for name in names}

    def parameters(self) -> list[nn.Parameter]:
        """What a clip of all heads would scale: weights, and biases where there are any."""
        found = [part._parameters.get(name) for part in self.projections().values() for name in ("weight", "bias")]
        return [param for param in found if param is not None]


def find_attention(
    model: nn.Module, heads: DescribeHeads | None = None, include: str | None = None, exclude: str | None = None
) -> list[Attention]:
    """All attention modules of a model, in its order.

    Args:
        model: The model.
        heads: Descriptions; they come before what is found by name.
        include: Regular expression that a module's name must match somewhere; ``None`` takes all.
        exclude: Regular expression that it must not match.

    Raises:
        ValueError: There is none; the heads of one are not known; or a description does not fit the module.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    described = dict(heads) if isinstance(heads, Mapping) else {}
    check_pattern("include", include)
    check_pattern("exclude", exclude)
    found, seen = [], set()
    for full_name, module in model.named_modules():
        name = canonical_name(full_name)
        wanted = (include is None or re.search(include, name)) and not (exclude and re.search(exclude, name))
        seen.add(name)
        if wanted and (own := _describe(name, module, heads, described)) is not None:
            _check(name, module, own)
            found.append(Attention(name, module, own))
    if unknown := sorted(set(described) - seen):
        raise ValueError(f"heads= describes {', '.join(unknown[:3])}, and the model has no such module.")
    theirs = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    if not found and theirs:
        raise ValueError(
            f"{canonical_name(theirs[0])!r} is torch.nn.MultiheadAttention, whose projections are one parameter and"
            " whose attention cannot be seen: QK-Clip does not know it. Use attention with projections of its own"
            " (q_proj, k_proj) that calls torch.nn.functional.scaled_dot_product_attention."
        )
    if not found:
        raise ValueError(
            "No attention found: no module has q_proj and k_proj, or q_proj (or q_b_proj) and kv_b_proj,"
            f" with include={include!r} and exclude={exclude!r}. For projections with other names give heads=, say"
            ' {"layers.0.attn": lm.AttentionHeads.grouped_query(num_heads=8, head_dim=64, query="qkv", key="qkv",'
            " key_start=512)}."
        )
    _check_own(found)
    return found


def require_clippable(found: Iterable[Attention]) -> None:
    """Check that a clip of the projections clips the logits.

    Raises:
        ValueError: Queries or keys are normalised behind the projection, or a projection is frozen.
    """
    for attention in found:
        children = attention.module.named_children()
        norms = [name for name, child in children if _QUERY_AND_KEY_NORM.match(name) and _is_norm(child)]
        if norms:
            raise ValueError(
                f"{attention.name} normalises queries or keys after their projection ({', '.join(norms)}), so that"
                " scaling the projection's rows would not change the logits, and such a model does not need it. Leave"
                " QKClip out, leave this module out by exclude=, or only watch, with log_only=True."
            )
        if not all(param.requires_grad for param in attention.parameters()):
            raise ValueError(
                f"A projection of {attention.name} is frozen (requires_grad=False), and a clip would change it. Leave"
                " the module out by exclude=, or only watch, with log_only=True."
            )


def _is_norm(part: Any) -> bool:
    return isinstance(part, nn.Module) and not isinstance(part, nn.Identity)


def _describe(
    name: str, module: nn.Module, heads: DescribeHeads | None, described: Mapping[str, AttentionHeads]
) -> AttentionHeads | None:
    if name in described:
        return described[name]
    if callable(heads) and (own := heads(name, module)) is not None:
        return own
    children = {child for child, part in module.named_children() if part is not None}
    query = "q_b_proj" if "q_b_proj" in children else "q_proj"
    if {query, "kv_b_proj", "kv_a_proj_with_mqa"} <= children:
        return _latent(name, module, query)
    if {"q_proj", "k_proj"} <= children:
        return _grouped_query(name, module)
    return None


def _grouped_query(name: str, module: nn.Module) -> AttentionHeads:
    rows, key_rows = (_weight(name, module, projection).shape[0] for projection in ("q_proj", "k_proj"))
    num_heads, head_dim = _number(module, *_NUM_HEADS), _number(module, "head_dim")
    if num_heads is None and head_dim is None:
        raise ValueError(
            f"{name} has q_proj and k_proj, and none of the attributes {', '.join(_NUM_HEADS)}, head_dim (its own or of"
            " its config) says how many heads there are. Describe it by heads=, or leave it out by exclude=."
        )
    head_dim = head_dim or rows // (num_heads or rows)
    num_heads = num_heads or rows // head_dim
    given = _number(module, *_NUM_KEY_VALUE_HEADS)
    num_key_value_heads = given or max(1, key_rows // head_dim)
    facts = {
        f"q_proj has {rows} rows": rows == num_heads * head_dim,
        f"k_proj has {key_rows} rows": key_rows == num_key_value_heads * head_dim,
        "query heads share key heads evenly": num_heads % num_key_value_heads == 0,
    }
    _require(name, facts, f"num_heads={num_heads}, num_key_value_heads={num_key_value_heads}, head_dim={head_dim}")
    return AttentionHeads.grouped_query(num_heads, head_dim, num_key_value_heads)


def _latent(name: str, module: nn.Module, query: str) -> AttentionHeads:
    """The widths follow from the shapes and the number of heads; where the module says them, they must agree."""
    num_heads = _number(module, *_NUM_HEADS)
    if num_heads is None:
        raise ValueError(
            f"{name} has {query} and kv_b_proj, and none of the attributes {', '.join(_NUM_HEADS)} (its own or of its"
            " config) says how many heads there are. Describe it by heads=, or leave it out by exclude=."
        )
    rows = _weight(name, module, query).shape[0]
    key_value_rows, latent = _weight(name, module, "kv_b_proj").shape
    down = _weight(name, module, "kv_a_proj_with_mqa").shape[0]
    rope = down - latent
    nope = rows // num_heads - rope
    value = key_value_rows // num_heads - nope
    facts = {
        f"{query} has {rows} rows": rows == num_heads * (nope + rope),
        f"kv_b_proj has {key_value_rows} rows": key_value_rows == num_heads * (nope + value),
        f"kv_a_proj_with_mqa has {down} rows, of which kv_b_proj takes {latent}": min(rope, nope - 1, value - 1) >= 0,
    }
    for attribute, width in (("qk_nope_head_dim", nope), ("qk_rope_head_dim", rope), ("v_head_dim", value)):
        given = _number(module, attribute)
        facts[f"{attribute}={given}"] = given in (None, width)
    _require(name, facts, f"num_heads={num_heads} of widths {nope} (plain), {rope} (rotated), {value} (value)")
    return AttentionHeads.latent(num_heads, nope, rope, value, query=query)


def _number(module: nn.Module, *attributes: str) -> int | None:
    """What the module, or its config, says."""
    for owner in (module, getattr(module, "config", None)):
        for attribute in attributes:
            value = getattr(owner, attribute, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _require(name: str, facts: Mapping[str, bool], reading: str) -> None:
    if wrong := [fact for fact, holds in facts.items() if not holds]:
        raise ValueError(
            f"{name}: {reading} does not go together with: {'; '.join(wrong)}. Describe the module by heads=, or leave"
            " it out by exclude=."
        )


def _weight(name: str, module: nn.Module, projection: str) -> Tensor:
    part = module.get_submodule(projection)
    weight = part._parameters.get("weight")
    if weight is None or weight.ndim != 2 or type(part).__name__ == "Conv1D":
        raise ValueError(
            f"{name}.{projection} is a {type(part).__name__}, and QKClip scales rows of a weight (rows, in_features)"
            " that the module has itself, as nn.Linear does (no adapter, no parametrization). Leave the module out by"
            " exclude=."
        )
    return weight


def _check(name: str, module: nn.Module, heads: AttentionHeads) -> None:
    """The rows of a description are there."""
    for own in (own for head in heads.rows for own in head):
        try:
            module.get_submodule(own.projection)
        except AttributeError:
            raise ValueError(
                f"heads= of {name} names {own.projection!r}, and no submodule of it is called that."
            ) from None
        rows = _weight(name, module, own.projection).shape[0]
        if own.stop > rows:
            raise ValueError(f"heads= of {name} names row {own.stop - 1} of {own.projection}, which has {rows}.")


def _check_own(found: Iterable[Attention]) -> None:
    """No two modules clip the same parameter."""
    owners: dict[nn.Parameter, str] = {}
    for attention in found:
        for param in attention.parameters():
            other = owners.setdefault(param, attention.name)
            if other != attention.name:
                raise ValueError(
                    f"{other} and {attention.name} share a projection, which would be clipped twice. Leave one of them"
                    " out by exclude=."
                )
