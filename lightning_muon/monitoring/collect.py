"""What crosses processes for the monitors: everything that was asked for, in one sum over one vector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_muon.monitoring.families import FAMILIES, Source
from lightning_muon.monitoring.iteration import momentum_singular_values, residuals
from lightning_muon.monitoring.request import Request
from lightning_muon.monitoring.sources import Measured, measured_parameters, weight_singular_values
from lightning_muon.muon import Muon

__all__ = ["Collection", "collect"]

# what rounding may add to a residual
_TOLERANCE = 1.1
_GRAD_NORM_KEYS = {"all": "muon/grad_norm", "muon": "muon/grad_norm_muon", "adamw": "muon/grad_norm_adamw"}


@dataclass
class Collection:
    """What was found, the same on every process.

    Attributes:
        values: Scalars by logging key, ``muon/<family>/<parameter>``.
        spectra: The weights' singular values by parameter, all its matrices together, where a spectrum was asked for.
        momentum_spectra: The same of what was orthogonalised, relative to its Frobenius norm.
        broken_promises: Parameters whose residual is above what the sequence allows, or not finite: the worst
            matrix's residual, and what is allowed.
    """

    values: dict[str, float] = field(default_factory=dict)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    momentum_spectra: dict[str, Tensor] = field(default_factory=dict)
    broken_promises: dict[str, tuple[float, float]] = field(default_factory=dict)


@torch.no_grad()
def collect(
    optimizers: Sequence[Muon], requests: Sequence[Request], names: Mapping[Tensor, str] | None = None
) -> Collection:
    """Measure, after a step. Every process must call it with the same requests; each computes its share.

    The owner of a matrix measures its spectrum and knows the size of its update. One sum over the processes brings
    everything together, and one copy to the host; a sum for each optimizer, where there are several.

    Args:
        optimizers: The optimizers.
        requests: What is wanted.
        names: What to call a parameter, where that is not its name in its optimizer.
    """
    collection = Collection()
    sources = list(dict.fromkeys(FAMILIES[family].source for request in requests for family in request.families))
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
            _fill(collection, request, family, measured, results[FAMILIES[family].source])
    for which, key in _GRAD_NORM_KEYS.items():
        norms = [optimizer.last_grad_norms[which] for optimizer in optimizers if which in optimizer.last_grad_norms]
        if norms:
            collection.values[key] = torch.linalg.vector_norm(torch.stack(norms)).item()
    return collection


def _fill(
    collection: Collection, request: Request, family: str, wanted: Sequence[Measured], found: Sequence[Tensor]
) -> None:
    """Turn what a source found (one vector per parameter) into the keys of one family."""
    own_values, source = [], FAMILIES[family].source
    for measured, vector in zip(wanted, found, strict=True):
        if not request.wants(measured.name) or not vector.numel():
            continue
        key = f"muon/{family}/{measured.name}"
        summary = FAMILIES[family].summarize(measured, vector)
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
        if source is weight_singular_values:
            collection.spectra[measured.name] = vector
        elif source is momentum_singular_values:
            collection.momentum_spectra[measured.name] = vector
        elif source is residuals:
            _check_promises(collection, measured, vector)
    if own_values:
        collection.values[f"muon/{family}/_min"] = min(own_values)
        collection.values[f"muon/{family}/_mean"] = sum(own_values) / len(own_values)
        collection.values[f"muon/{family}/_max"] = max(own_values)


def _check_promises(collection: Collection, measured: Measured, found: Tensor) -> None:
    broken = [
        (residual, promise)
        for residual, promise, is_there in found.reshape(-1, 3).tolist()
        if is_there and not residual <= _TOLERANCE * promise  # NaN is not
    ]
    if broken:
        collection.broken_promises[measured.name] = max(broken, key=_excess)


def _excess(found: tuple[float, float]) -> float:
    residual, promise = found
    return residual / promise if math.isfinite(residual) else math.inf
