"""What a Muon user watches: measures of weights and updates, and how they come together across processes."""

from lightning_muon.monitoring.collect import Collection, collect
from lightning_muon.monitoring.request import Mode, Request

__all__ = ["Collection", "Mode", "Request", "collect"]
