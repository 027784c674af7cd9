"""Attention that cannot be seen is said, and never silently left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from lightning.fabric.utilities import rank_zero_warn

__all__ = ["Unseen"]

# looks, after which a module that never ran is mentioned
_PATIENCE = 10


class Unseen:
    """Who of the watched modules has run, over all looks.

    Args:
        names: The modules.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        self._never_ran, self._looks = set(self._names), 0

    def check(self, maxima: Mapping[str, Sequence[float]], ran: Sequence[float]) -> None:
        """Take in one look. All processes have the same one, so all raise, or none.

        Args:
            maxima: Of all processes.
            ran: For each module 0 if it ran nowhere, 1 if it ran and was seen, 2 if it was not seen somewhere.

        Raises:
            RuntimeError: A module has run and was not seen, or none has ever run.
        """
        outcomes = dict(zip(self._names, ran, strict=True))
        unseen = [name for name, outcome in outcomes.items() if outcome > 1 and max(maxima[name]) == -math.inf]
        if unseen:
            raise RuntimeError(
                f"{_some(unseen)}: attention has run and its logits were not seen, because it does not call"
                " torch.nn.functional.scaled_dot_product_attention. With transformers choose"
                ' attn_implementation="sdpa"; in a module of your own with another kernel (flash-attn), call'
                " lm.observe_attention(self, query, key, is_causal=True) in its forward; or leave it out by exclude=."
            )
        self._never_ran -= {name for name, outcome in outcomes.items() if outcome or max(maxima[name]) > -math.inf}
        self._looks += 1
        if len(self._never_ran) == len(self._names):
            raise RuntimeError(
                f"No attention module has run in training since QKClip began to watch, as far as it sees:"
                f" {_some(self._names)}. Where the model is compiled as a whole, watch it before its first training"
                " step, or call torch.compiler.reset() after; where attention is computed elsewhere, call"
                " lm.observe_attention there."
            )
        if self._looks == _PATIENCE and self._never_ran:
            rank_zero_warn(
                f"QKClip watches {_some(sorted(self._never_ran))}, which did not run in the first {_PATIENCE} steps"
                " that were watched, or ran in code that was compiled before: it is not clipped. Leave it out by"
                " exclude= if that is meant."
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
