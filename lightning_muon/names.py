"""Fully qualified parameter names, as they are in the user's own module."""

from __future__ import annotations

__all__ = ["canonical_name"]

# Put before a name by torch.compile, DistributedDataParallel, Fabric and activation checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "_forward_module", "_checkpoint_wrapped_module"})


def canonical_name(name: str) -> str:
    """The name without the parts that wrappers add; checkpoints must not depend on who wrapped the module.

    ``module.`` is DistributedDataParallel's, but also a name that people give to their own attributes, so it goes
    only from the front of a name that another wrapper marks.
    """
    parts = name.split(".")
    kept = [part for part in parts if part not in _WRAPPERS]
    if len(kept) < len(parts) and kept[0] == "module":
        kept = kept[1:]
    return ".".join(kept)
