"""What crosses processes for the monitors: everything that was asked for, in one sum over one vector."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_muon.monitoring.measures import rms, spectral_norm, stable_rank, svd_entropy
from lightning_muon.monitoring.sources import (
    Measured,
    measured_parameters,
    update_squares,
    weight_singular_values,
    weight_squares,
)
from lightning_muon.muon import Muon

__all__ = ["FAMILIES", "Collection", "Request", "collect"]

Mode = Literal["brief", "detailed"]
_Source = Callable[[Muon, Sequence[Measured]], list[Tensor]]
_Values = tuple[float, list[float]]

_GRAD_NORM_KEYS = {"all": "muon/grad_norm", "muon": "muon/grad_norm_muon", "adamw": "muon/grad_norm_adamw"}


@dataclass(frozen=True)
class Request:
    """What a monitor wants to know.

    Args:
        families: Names of measures, from ``FAMILIES``.
        include: Regular expression that a parameter's name must match somewhere; ``None`` takes all.
        exclude: Regular expression that it must not match.
        mode: For a parameter of several matrices, ``"brief"`` gives the median, minimum and maximum;
            ``"detailed"`` gives each matrix as well.

    Raises:
        ValueError: An unknown mode or measure.
    """

    families: tuple[str, ...]
    include: str | None = None
    exclude: str | None = None
    mode: Mode = "brief"

    def __post_init__(self) -> None:
        if self.mode not in ("brief", "detailed"):
            raise ValueError(f"mode={self.mode!r} is not known; choose 'brief' or 'detailed'.")
        unknown = set(self.families) - set(FAMILIES)
        if unknown:
            raise ValueError(f"Unknown measures {sorted(unknown)}; choose from {', '.join(FAMILIES)}.")

    def wants(self, name: str) -> bool:
        """Whether the request is about this parameter."""
        included = self.include is None or re.search(self.include, name) is not None
        return included and (self.exclude is None or re.search(self.exclude, name) is None)


@dataclass
class Collection:
    """What was found, the same on every process.

    Attributes:
        values: Scalars by logging key, ``muon/<family>/<parameter>``.
        spectra: Singular values by parameter, all its matrices together, where a spectrum was asked for.
    """

    values: dict[str, float] = field(default_factory=dict)
    spectra: dict[str, Tensor] = field(default_factory=dict)


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
    results: dict[_Source, list[Tensor]] = {source: [] for source in sources}
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
    own_values = []
    for measured, vector in zip(wanted, found, strict=True):
        if not request.wants(measured.name) or not vector.numel():
            continue
        key = f"muon/{family}/{measured.name}"
        own, values = FAMILIES[family].summarize(measured, vector)
        collection.values[key] = own
        own_values.append(own)
        if len(values) > 1:
            collection.values[f"{key}.min"], collection.values[f"{key}.max"] = min(values), max(values)
            if request.mode == "detailed":
                collection.values.update({f"{key}.{number}": value for number, value in enumerate(values)})
        if FAMILIES[family].source is weight_singular_values:
            collection.spectra[measured.name] = vector
    if own_values:
        collection.values[f"muon/{family}/_min"] = min(own_values)
        collection.values[f"muon/{family}/_mean"] = sum(own_values) / len(own_values)
        collection.values[f"muon/{family}/_max"] = max(own_values)


# A family is what is logged of a source: the parameter's own value, and that of every matrix where it is known.


@dataclass(frozen=True)
class _Family:
    source: _Source
    summarize: Callable[[Measured, Tensor], _Values]


def _rms(measured: Measured, squares: Tensor) -> _Values:
    own = rms(squares.sum().item(), measured.param.numel())
    if len(squares) != len(measured.numels):  # AdamW's update is known for the parameter only
        return own, []
    return own, [rms(s, n) for s, n in zip(squares.tolist(), measured.numels, strict=True)]


def _of_spectrum(function: Callable[[Tensor], Tensor]) -> Callable[[Measured, Tensor], _Values]:
    def summarize(measured: Measured, sigma: Tensor) -> _Values:
        values = torch.stack([function(part) for part in torch.split(sigma, measured.ranks)])
        return values.median().item(), values.tolist()

    return summarize


FAMILIES = {
    "update_rms": _Family(update_squares, _rms),
    "weight_rms": _Family(weight_squares, _rms),
    "weight_spectral_norm": _Family(weight_singular_values, _of_spectrum(spectral_norm)),
    "weight_stable_rank": _Family(weight_singular_values, _of_spectrum(stable_rank)),
    "weight_svd_entropy": _Family(weight_singular_values, _of_spectrum(svd_entropy)),
}
