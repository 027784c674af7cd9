"""Which matrices belong together, in Moonlight's words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

KINDS = {
    "AttnQO": r"self_attn\.(q_proj|q_a_proj|q_b_proj|o_proj)\.weight",
    "AttnKV": r"self_attn\.(k_proj|v_proj|kv_a_proj_with_mqa|kv_b_proj)\.weight",
    "Experts": r"mlp\.experts\.(gate|up|down|gate_up)_proj",
    "SharedExperts": r"mlp\.shared_experts\.(gate|up|down)_proj\.weight",
    "Dense": r"layers\.\d+\.mlp\.(gate|up|down)_proj\.weight",
    "Router": r"mlp\.gate\.weight",
}
_NUMBER = re.compile(r"(?P<stack>.*)\.(?P<number>\d+|min|max)")  # of a stack: <name>.0, <name>.1, …, .min, .max


def kind_of(name: str) -> str | None:
    """The kind of a hidden parameter; none of embedding, head and norms. A matrix of a stack is of its stack's kind."""
    stack = _NUMBER.fullmatch(name)
    parameter = name if stack is None else stack["stack"]
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern + "$", parameter)), None)


def parameters(values: Mapping[str, float]) -> dict[str, float]:
    """Of a monitor's values by name, those of whole hidden parameters."""
    return {name: value for name, value in values.items() if kind_of(name) and not _NUMBER.fullmatch(name)}


def matrices(values: Mapping[str, float]) -> dict[str, float]:
    """Of a monitor's values by name (``mode="detailed"``), one for each hidden matrix: of a stack, each of its own."""
    found = {}
    for name, value in values.items():
        part = _NUMBER.fullmatch(name)
        is_whole_stack = part is None and f"{name}.0" in values
        is_summary = part is not None and part["number"] in ("min", "max")
        if kind_of(name) and not is_whole_stack and not is_summary:
            found[name] = value
    return found


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Hidden parameters or matrices, in the order of `KINDS`; kinds that a model does not have are left out."""
    groups: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name in names:
        if (kind := kind_of(name)) is not None:
            groups[kind].append(name)
    return {kind: members for kind, members in groups.items() if members}
