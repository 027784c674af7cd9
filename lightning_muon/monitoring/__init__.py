"""What a Muon user watches: measures of weights and updates, and how they come together across processes."""

from lightning_muon.monitoring.collect import Collection, Request, collect

__all__ = ["Collection", "Request", "collect"]
