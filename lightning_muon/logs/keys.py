"""From logged keys to what they say about which parameter."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

__all__ = ["matrix_names", "own_keys"]

# Logged of matrices and of nothing else.
_OF_MATRICES = ("muon/weight_spectral_norm", "muon/weight_svd_entropy", "muon/momentum_q50")

# Of the matrices of one parameter, beside its own value.
_OF_PARTS = re.compile(r"\.(min|max|\d+)$")


def own_keys(keys: Iterable[str], family: str) -> dict[str, str]:
    """The keys of a family that hold a parameter's, or a module's, own value.

    Left out are aggregates over the parameters (``_min``, ``_mean``, ``_max``) and what stands beside a parameter's own
    value: ``.min`` and ``.max`` of its matrices, and each of them, ``.0``, ``.1``, ….

    Args:
        keys: All that were logged.
        family: What stands before the name, without the last slash: ``"muon/update_rms"``.

    Returns:
        Key by name, in the order of ``keys``.
    """
    prefix = f"{family}/"
    found = {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}
    return {
        name: key
        for name, key in found.items()
        if not name.startswith("_") and not (_OF_PARTS.search(name) and _OF_PARTS.sub("", name) in found)
    }


def matrix_names(keys: Collection[str]) -> frozenset[str]:
    """The parameters that are known to be matrices by what was logged of them; empty where the keys do not tell.

    Args:
        keys: All that were logged.
    """
    return frozenset(name for family in _OF_MATRICES for name in own_keys(keys, family))
