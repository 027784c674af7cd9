"""From a matrix to its polar factor. Knows nothing of parameters, optimizers or processes."""

from lightning_muon.orthogonalize.auto import Auto
from lightning_muon.orthogonalize.call import orthogonalize, orthogonalize_batch
from lightning_muon.orthogonalize.dispatch import default_dtype, default_dtype_of, orthogonalization_flops
from lightning_muon.orthogonalize.exact import rank_tolerance
from lightning_muon.orthogonalize.generator import polar_express
from lightning_muon.orthogonalize.lanczos import spectral_norm
from lightning_muon.orthogonalize.safety import check_range
from lightning_muon.orthogonalize.sequence import PolynomialSequence
from lightning_muon.orthogonalize.specification import (
    Orthogonalization,
    auto_settings,
    available_sequences,
    nominal_sequence,
    plain,
    polynomial_sequence,
    same_orthogonalization,
)
from lightning_muon.orthogonalize.spectrum import noise_floor, relative_singular_values, singular_values
from lightning_muon.orthogonalize.telemetry import Probe

__all__ = [
    "Auto",
    "Orthogonalization",
    "PolynomialSequence",
    "Probe",
    "auto_settings",
    "available_sequences",
    "check_range",
    "default_dtype",
    "default_dtype_of",
    "noise_floor",
    "nominal_sequence",
    "orthogonalization_flops",
    "orthogonalize",
    "orthogonalize_batch",
    "plain",
    "polar_express",
    "polynomial_sequence",
    "rank_tolerance",
    "relative_singular_values",
    "same_orthogonalization",
    "singular_values",
    "spectral_norm",
]
