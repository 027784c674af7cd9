"""Experts that get no token any more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_muon.monitoring.alarms import Finding

__all__ = ["StarvedExperts"]

# Both have to be reached: a small batch leaves an expert out by chance, and routers that have just begun to learn
# leave out half of them for a hundred steps.
_MEASUREMENTS = 20
_STEPS = 500


class StarvedExperts:
    """Which experts have had no token, for how many measurements and since which step.

    An expert is in trouble after twenty measurements in a row, over 500 optimizer steps at least.
    """

    kind = "dead_experts"

    def __init__(self) -> None:
        self._first_step: int | None = None
        self._last_token: dict[str, Tensor] = {}  # (E,): at which step; where none was seen, the first
        self._without: dict[str, Tensor] = {}  # (E,): measurements in a row
        self._reported: dict[str, set[int]] = {}

    def look(self, step: int, tokens: Mapping[str, Tensor]) -> list[Finding]:
        """Take in a measurement.

        Args:
            step: The optimizer step that was measured.
            tokens: Tokens per expert, `(E,)`, by layer.

        Returns:
            Findings about the experts that are in trouble, or were.
        """
        if self._first_step is None:
            self._first_step = step
        findings = []
        for layer, counts in tokens.items():
            nobody = torch.zeros(len(counts), dtype=torch.int64)
            has_tokens = counts > 0
            self._without[layer] = without = (self._without.get(layer, nobody) + 1).where(~has_tokens, 0)
            last = self._last_token.get(layer, nobody + self._first_step)
            self._last_token[layer] = last = last.where(~has_tokens, step)
            dead = (without >= _MEASUREMENTS) & (step - last >= _STEPS)
            reported = self._reported.setdefault(layer, set())
            reported.update(dead.nonzero().flatten().tolist())
            for expert in sorted(reported):
                trouble = _trouble(int(last[expert]), int(without[expert])) if dead[expert] else None
                findings.append(Finding(self.kind, f"{layer}.{expert}", trouble))
        return findings


def _trouble(last: int, measurements: int) -> str:
    return (
        f"this expert has had no token since step {last}, in {measurements} measurements. It learns nothing and takes"
        " no part in the model. Stronger balancing (a larger step of the balancing bias, or weight of the auxiliary"
        " loss) or a smaller learning rate of the router help; moe/dead_experts and moe/load_entropy of its layer show"
        " how it came to this."
    )
