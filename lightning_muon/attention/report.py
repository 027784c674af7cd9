"""What is logged of attention's logits, and what is an alarm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_muon.arguments import check_mode
from lightning_muon.monitoring.alarms import Finding

__all__ = ["ALARM", "attention_figures", "attention_findings"]

ALARM = "attention_logits"
_NORMS = "a smaller learning rate of queries and keys, or a norm behind their projections, helps"


def attention_figures(maxima: Mapping[str, Sequence[float]], clipped: Mapping[str, int], mode: str) -> dict[str, float]:
    """Scalars by logging key.

    Args:
        maxima: S of each head by module; -∞ where there was nothing to see.
        clipped: How many heads were clipped, by module.
        mode: ``"brief"``, or ``"detailed"`` for every head as well.

    Raises:
        ValueError: Another mode.
    """
    check_mode(mode)
    values: dict[str, float] = {}
    own = {name: max(heads) for name, heads in maxima.items() if max(heads) > -math.inf}
    for name, largest in own.items():
        values[f"attention/max_logit/{name}"] = largest
        if mode == "detailed":
            heads = enumerate(maxima[name])
            values.update({f"attention/max_logit/{name}.{head}": s for head, s in heads if s > -math.inf})
    if own:
        values["attention/max_logit/_max"] = max(own.values())
        values["attention/max_logit/_mean"] = sum(own.values()) / len(own)
        values["attention/max_logit/_min"] = min(own.values())
    return {**values, **{f"attention/clipped_heads/{name}": float(count) for name, count in clipped.items()}}


def attention_findings(maxima: Mapping[str, Sequence[float]], tau: float, log_only: bool) -> list[Finding]:
    """A look at each module that has run: is a head above τ (where nothing is clipped), or above 2τ?"""
    threshold = tau if log_only else 2 * tau
    findings = []
    for name, heads in maxima.items():
        if max(heads) > -math.inf:
            findings.append(Finding(ALARM, name, _trouble(heads, tau, threshold, log_only)))
    return findings


def _trouble(heads: Sequence[float], tau: float, threshold: float, log_only: bool) -> str | None:
    worst = max(range(len(heads)), key=heads.__getitem__)
    largest = heads[worst]
    if largest == math.inf:
        return (
            f"an attention logit of head {worst} is not finite. Its queries or keys hold NaN or infinity, and QKClip"
            " leaves such a head alone; look at what goes into this module."
        )
    if not largest > threshold:
        return None
    above = sum(one > threshold for one in heads)
    others = f" ({above} of its {len(heads)} heads are above {threshold:g})" if above > 1 else ""
    if log_only:
        return (
            f"the largest attention logit of head {worst} is {largest:.4g}, above τ = {tau:g}{others}, and QKClip only"
            f" watches. log_only=False clips it; {_NORMS}."
        )
    return (
        f"the largest attention logit of head {worst} is {largest:.4g}, more than twice τ = {tau:g}{others}. It is"
        f" clipped to τ now. If it comes back, logits grow faster than a clip after each step undoes: {_NORMS}."
    )
