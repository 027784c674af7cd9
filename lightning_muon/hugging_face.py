"""How the models of Hugging Face's `transformers` fuse their projections: known by the classes of their modules.

A class says by its ``forward`` how it cuts what a projection returns; the sizes come from the module and its config.
Nothing is imported from `transformers`, and no order is guessed from a name: ``query_key_value`` is dealt out by heads
in GPT-NeoX, by groups of heads in Falcon, and lies in three pieces elsewhere.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

__all__ = ["Fused", "fused_projection", "fused_stack"]


@dataclass(frozen=True)
class Fused:
    """The matrices of a fused parameter.

    Attributes:
        what: In words, for the table of decisions.
        split_sizes: Output features of each; empty for one matrix.
        interleaved: In how many runs each of them lies in the parameter; see ``lightning_muon.Rule``.
        transposed: Whether the parameter is stored ``(in, out)``.
        stack: How many stacked matrices a parameter of two dimensions holds, one below the other.
    """

    what: str
    split_sizes: tuple[int, ...] = ()
    interleaved: int = 1
    transposed: bool = False
    stack: int = 1


def fused_projection(projection: str, parent: nn.Module, features: int) -> Fused | None:
    """How a module's fused projection is cut, where the module's class is known.

    Args:
        projection: The projection's name in ``parent``, ``"query_key_value"`` say.
        parent: The module that uses it.
        features: Its output features.

    Returns:
        ``None`` for a class, or a projection, that is not known to be fused.

    Raises:
        ValueError: The class is known, and the module does not say what the sizes are.
    """
    found = _known(_PROJECTIONS, parent, projection)
    if found is None:
        return None
    owner, sizes = found
    try:
        fused = sizes(parent, features)
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        raise ValueError(_unlike(owner, projection, f"{type(error).__name__}: {error}")) from None
    if sum(fused.split_sizes) != features:
        raise ValueError(_unlike(owner, projection, f"{fused.split_sizes} of {features} output features"))
    return fused


def fused_stack(leaf: str, owner: nn.Module, parent: nn.Module | None, shape: tuple[int, ...]) -> Fused | None:
    """How a parameter that holds many matrices, those of experts say, is cut.

    The modules of experts in `transformers` 5 say themselves how they store them: ``is_transposed`` for
    ``(experts, in, out)``, ``is_concatenated=False`` for gate and up in turn.

    Args:
        leaf: The parameter's own name.
        owner: The module that holds it.
        parent: The module that uses ``owner``, if known.
        shape: The parameter's.

    Returns:
        ``None`` for a module that is not known to stack matrices.

    Raises:
        ValueError: The class is known, and the module does not say what the sizes are.
    """
    found = _known(_STACKS, owner, leaf)
    if found is not None:
        try:
            fused = found[1](owner, shape)
        except (AttributeError, TypeError, ZeroDivisionError) as error:
            raise ValueError(_unlike(found[0], leaf, f"{type(error).__name__}: {error}")) from None
        if len(shape) == 2 and (fused.stack < 1 or shape[0] % fused.stack):
            raise ValueError(_unlike(found[0], leaf, f"{fused.stack} matrices in {shape[0]} rows"))
        return fused
    if _is_a(owner, "JetMoeParallelExperts"):
        is_gated = _is_a(parent, "JetMoeMoE") and getattr(parent, "input_linear", None) is owner
        return _halves(_GATE_UP, shape[1]) if is_gated else Fused(_STACK)
    transposed = getattr(owner, "is_transposed", None)
    if not isinstance(transposed, bool) or len(shape) != 3:
        return None
    if leaf != "gate_up_proj":
        return Fused(_STACK, transposed=transposed)
    if not getattr(owner, "is_concatenated", True):
        return _halves(f"{_GATE_UP} in turn", shape[2 if transposed else 1], transposed=transposed, in_turn=True)
    return _halves(_GATE_UP, shape[2 if transposed else 1], transposed=transposed)


_STACK, _GATE_UP = "stack of experts", "experts' fused gate, up"
_Cut = Callable[[Any, int], Fused]
"""From the module that uses a projection, and its output features."""
_CutStack = Callable[[Any, tuple[int, ...]], Fused]
"""From the module that holds a stack, and its shape."""
_T = TypeVar("_T")


def _known(table: Mapping[tuple[str, str], _T], module: nn.Module, name: str) -> tuple[str, _T] | None:
    # FSDP makes subclasses with names of their own
    names = ((kind.__name__, name) for kind in type(module).__mro__)
    return next(((known[0], table[known]) for known in names if known in table), None)


def _is_a(module: nn.Module | None, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(module).__mro__)


def _unlike(owner: str, projection: str, fault: str) -> str:
    return (
        f"the {projection} of {owner} is fused, but this one is cut in none of the ways that are known of it ({fault})."
        f" Say how: rules=[lm.Rule({projection!r}, split_sizes=(...), interleaved=...)]."
    )


def _halves(what: str, features: int, *, transposed: bool = False, in_turn: bool = False) -> Fused:
    half = features // 2
    return Fused(what, (half, half), half if in_turn else 1, transposed)


def _in_halves(what: str) -> _Cut:
    return lambda module, features: _halves(what, features)


def _by_heads(heads: str) -> _Cut:
    """Three equal blocks, a head of each in turn; ``heads`` is where the module has their number."""
    number = operator.attrgetter(heads)
    return lambda module, features: Fused("fused q, k, v by heads", (features // 3,) * 3, number(module))


def _gpt2(module: Any, features: int) -> Fused:
    if module.is_cross_attention:
        return _halves("fused k, v", features)
    return Fused("fused q, k, v", (features // 3,) * 3)


def _grouped_queries(module: Any, features: int) -> Fused:
    key = module.num_key_value_heads * module.head_dim
    return Fused("fused q, k, v", (features - 2 * key, key, key))


def _falcon(module: Any, features: int) -> Fused:
    if not module.new_decoder_architecture and not module.multi_query:
        return Fused("fused q, k, v by heads", (features // 3,) * 3, module.num_heads)
    groups = module.num_kv_heads  # 1 under multi-query attention
    key = groups * module.head_dim
    what = "fused q, k, v by groups of heads" if groups > 1 else "fused q, k, v"
    return Fused(what, (features - 2 * key, key, key), groups)


def _gpt_bigcode(module: Any, features: int) -> Fused:
    if module.is_cross_attention:
        return _halves("fused k, v", features)
    if not module.multi_query:
        return Fused("fused q, k, v by heads", (features // 3,) * 3, module.num_heads)
    return Fused("fused q, k, v", (module.embed_dim, module.kv_dim, module.kv_dim))


def _codegen(module: Any, features: int) -> Fused:
    return Fused("fused q, v, k in four groups", (features // 3,) * 3, 4)  # a constant there too


def _query_and_gate(module: Any, features: int) -> Fused:
    return Fused("fused q, gate by heads", (features // 2,) * 2, features // (2 * module.head_dim))


def _delta_net(module: Any, features: int) -> Fused:
    return Fused("fused q, k, v", (module.key_dim, module.key_dim, module.value_dim))


def _delta_net_by_heads(module: Any, features: int) -> Fused:
    key, value = module.key_dim, module.value_dim
    return Fused("fused q, k, v, z by heads", (key, key, value, value), module.num_k_heads)


def _gates_by_heads(module: Any, features: int) -> Fused:
    return Fused("fused b, a by heads", (features // 2,) * 2, module.num_k_heads)


def _mamba2(module: Any, features: int) -> Fused:
    inner, states = module.intermediate_size, module.n_groups * module.ssm_state_size
    return Fused("fused z, x, B, C, dt", (inner, inner, states, states, module.num_heads))


def _selective(module: Any, features: int) -> Fused:
    states = module.ssm_state_size
    return Fused("fused dt, B, C", (module.time_step_rank, states, states))


def _latent_query_and_gate(module: Any, features: int) -> Fused:
    heads = module.num_heads
    return Fused("fused q, gate by heads", (heads * module.qk_head_dim, heads * module.v_head_dim), heads)


def _zamba(module: Any, features: int) -> Fused:
    return _halves("fused x, z in turn", features, in_turn=True)


def _groups(module: Any, shape: tuple[int, ...]) -> Fused:
    return Fused("stack of matrices", stack=module.n_groups)


def _dbrx(transposed: bool) -> _CutStack:
    return lambda module, shape: Fused(_STACK, transposed=transposed, stack=module.moe_num_experts)


def _transposed(module: Any, shape: tuple[int, ...]) -> Fused:
    return Fused("stack of matrices", transposed=True)


_GATED = ("Qwen3Next", "Qwen3_5", "Qwen3_5Moe", "Qwen4ExpText")
_MAMBA = ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer")
_MAMBA2 = ("Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "NemotronHMamba2Mixer", "Zamba2MambaMixer")
_GRANITE_MLP = ("GraniteMoeSharedMLP", "GraniteMoeHybridMLP", "GraniteMoeSWAMLP")

_PROJECTIONS: dict[tuple[str, str], _Cut] = {
    ("GPT2Attention", "c_attn"): _gpt2,
    ("GPTBigCodeAttention", "c_attn"): _gpt_bigcode,
    ("GPTNeoXAttention", "query_key_value"): _by_heads("config.num_attention_heads"),
    ("GPTNeoXJapaneseAttention", "query_key_value"): _by_heads("num_attention_heads"),
    ("BloomAttention", "query_key_value"): _by_heads("num_heads"),
    ("PersimmonAttention", "query_key_value"): _by_heads("num_heads"),
    ("FalconAttention", "query_key_value"): _falcon,
    ("CodeGenAttention", "qkv_proj"): _codegen,
    ("MiniMaxLightningAttention", "qkv_proj"): _by_heads("num_attention_heads"),
    ("Phi3Attention", "qkv_proj"): _grouped_queries,
    ("Phi4MultimodalAttention", "qkv_proj"): _grouped_queries,
    ("DbrxAttention", "Wqkv"): _grouped_queries,
    ("JetMoeAttention", "kv_proj"): _in_halves("fused k, v"),
    **{(f"{family}Attention", "q_proj"): _query_and_gate for family in _GATED},
    **{(f"{family}GatedDeltaNet", "in_proj_qkv"): _delta_net for family in _GATED[1:]},
    ("Qwen3NextGatedDeltaNet", "in_proj_qkvz"): _delta_net_by_heads,
    ("Qwen3NextGatedDeltaNet", "in_proj_ba"): _gates_by_heads,
    **{(mixer, "in_proj"): _in_halves("fused x, z") for mixer in _MAMBA},
    **{(mixer, "x_proj"): _selective for mixer in _MAMBA},
    ("AXK2Attention", "q_gate_proj"): _latent_query_and_gate,
    ("MoshiGatingMLP", "fc1"): _in_halves("fused gate, up"),
    **{(mixer, "in_proj"): _mamba2 for mixer in (*_MAMBA2, "GraniteMoeHybridMambaLayer")},
    ("ZambaMambaMixer", "in_proj"): _zamba,
    ("ModernBertDecoderMLP", "Wi"): _in_halves("fused input, gate"),
    **{(mlp, "input_linear"): _in_halves("fused gate, up") for mlp in _GRANITE_MLP},
}

_STACKS: dict[tuple[str, str], _CutStack] = {
    ("DbrxExpertGLU", "w1"): _dbrx(transposed=False),
    ("DbrxExpertGLU", "v1"): _dbrx(transposed=False),
    ("DbrxExpertGLU", "w2"): _dbrx(transposed=True),
    ("Llama4TextExperts", "gate_up_proj"): lambda module, shape: _halves(_GATE_UP, shape[2], transposed=True),
    ("Llama4TextExperts", "down_proj"): _transposed,
    ("DeepseekV4GroupedLinear", "weight"): _groups,
    ("LongcatFlashExperts", "gate_up_proj"): lambda module, shape: _halves(_GATE_UP, shape[1]),
    ("RecurrentGemmaRglru", "input_gate_weight"): _transposed,
    ("RecurrentGemmaRglru", "recurrent_gate_weight"): _transposed,
}
