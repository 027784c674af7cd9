"""From logged momentum spectra to the cheapest orthogonalisation of every layer."""

from lightning_muon.advising.advice import Advice, Need, advise

__all__ = ["Advice", "Need", "advise"]
