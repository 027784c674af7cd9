"""Power laws of momentum spectra over model sizes, as in "Spectral Scaling Laws of Muon" (arXiv 2606.04058)."""

from lightning_muon.scaling.law import Estimate, LocalSlope, PowerLaw, fit_power_law
from lightning_muon.scaling.sequences import smallest_sequence

__all__ = ["Estimate", "LocalSlope", "PowerLaw", "fit_power_law", "smallest_sequence"]
