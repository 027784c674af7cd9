"""Fully qualified parameter names, as they are in the user's own module."""

from __future__ import annotations

__all__ = ["canonical_name"]

# Put before a name by torch.compile, Fabric and activation checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "_forward_module", "_checkpoint_wrapped_module"})


def canonical_name(name: str) -> str:
    """The name without the parts that wrappers add; checkpoints must not depend on who wrapped the module.

    ``module`` is DistributedDataParallel's, but also a name that people give to their own attributes, so it goes only
    where Fabric has put DistributedDataParallel inside its own wrapper.
    """
    parts = name.split(".")
    if parts[:2] == ["_forward_module", "module"]:
        parts = parts[2:]
    return ".".join(part for part in parts if part not in _WRAPPERS)
