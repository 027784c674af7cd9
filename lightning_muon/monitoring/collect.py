"""What crosses processes for the monitors: everything that was asked for, in one sum over one vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_muon.monitoring.alarms import Finding
from lightning_muon.monitoring.families import FAMILIES, Source
from lightning_muon.monitoring.iteration import momentum_singular_values
from lightning_muon.monitoring.request import Request
from lightning_muon.monitoring.sources import Measured, measured_parameters, weight_singular_values
from lightning_muon.monitoring.subject import Subject
from lightning_muon.monitoring.troubles import Judge

__all__ = ["Collection", "collect"]

_GRAD_NORM_KEYS = {"all": "muon/grad_norm", "muon": "muon/grad_norm_muon", "adamw": "muon/grad_norm_adamw"}


@dataclass
class Collection:
    """What was found, the same on every process.

    Attributes:
        values: Scalars by logging key, ``muon/<family>/<parameter>``.
        spectra: The weights' singular values by parameter, all its matrices together, where a spectrum was asked for.
        momentum_spectra: The same of what was orthogonalised, relative to its Frobenius norm.
        findings: What the judges say.
    """

    values: dict[str, float] = field(default_factory=dict)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    momentum_spectra: dict[str, Tensor] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


@torch.no_grad()
def collect(
    optimizers: Sequence[Subject],
    requests: Sequence[Request],
    names: Mapping[Tensor, str] | None = None,
    judges: Sequence[Judge] = (),
) -> Collection:
    """Measure, after a step. Every process must call it with the same requests; each computes its share.

    The owner of a matrix measures its spectrum and knows the size of its update. One sum over the processes brings
    everything together, and one copy to the host; a sum for each optimizer, where there are several.

    Args:
        optimizers: The optimizers.
        requests: What is wanted.
        names: What to call a parameter, where that is not its name in its optimizer.
        judges: Who looks at what is found of each parameter, where the family is asked for that they judge.
    """
    collection = Collection()
    families = [family for request in requests for family in request.families]
    sources = list(dict.fromkeys(source for family in families for source in FAMILIES[family].sources))
    measured: list[Measured] = []
    results: dict[Source, list[Tensor]] = {source: [] for source in sources}
    for optimizer in optimizers:
        wanted = [
            one for one in measured_parameters(optimizer, names or {}) if any(r.wants(one.name) for r in requests)
        ]
        parts = [vector for source in sources for vector in source(optimizer, wanted)]
        if parts:
            total = optimizer.partition.total(torch.cat(parts)).cpu()
            found = iter(torch.split(total, [part.numel() for part in parts]))
            for source in sources:
                results[source] += [next(found) for _ in wanted]
            measured += wanted
    for request in requests:
        for family in request.families:
            vectors = zip(*(results[source] for source in FAMILIES[family].sources), strict=True)
            pairs = zip(measured, vectors, strict=True)
            _fill(collection, request, family, [(one, found) for one, found in pairs if request.wants(one.name)])
    for judge in judges:
        asking = [request for request in requests if judge.family in request.families]
        for one, vector in zip(measured, results.get(judge.source, ()), strict=bool(asking)):
            if any(request.wants(one.name) for request in asking):
                finding = judge.finding(one, vector)
                collection.findings += [] if finding is None else [finding]
    for which, key in _GRAD_NORM_KEYS.items():
        norms = [optimizer.last_grad_norms[which] for optimizer in optimizers if which in optimizer.last_grad_norms]
        if norms:
            collection.values[key] = torch.linalg.vector_norm(torch.stack(norms)).item()
    return collection


def _fill(
    collection: Collection, request: Request, family: str, found: Sequence[tuple[Measured, tuple[Tensor, ...]]]
) -> None:
    """Turn what sources found (vectors for each parameter) into the keys of one family."""
    own_values = []
    for measured, vectors in found:
        key = f"muon/{family}/{measured.name}"
        summary = FAMILIES[family].summarize(measured, *vectors) if vectors[0].numel() else None
        if summary is None:
            continue
        collection.values[key] = summary.own
        own_values.append(summary.own)
        values = summary.matrices
        if values and len(measured.numels) > 1:
            collection.values[f"{key}.min"] = min(values.values())
            collection.values[f"{key}.max"] = max(values.values())
            if request.mode == "detailed":
                collection.values.update({f"{key}.{number}": value for number, value in values.items()})
        if FAMILIES[family].sources == (weight_singular_values,):
            collection.spectra[measured.name] = vectors[0]
        elif FAMILIES[family].sources == (momentum_singular_values,):
            collection.momentum_spectra[measured.name] = vectors[0]
    if own_values:
        collection.values[f"muon/{family}/_min"] = min(own_values)
        collection.values[f"muon/{family}/_mean"] = sum(own_values) / len(own_values)
        collection.values[f"muon/{family}/_max"] = max(own_values)
