"""What a Muon user watches: measures of weights and updates, and how they come together across processes."""

from lightning_muon.monitoring.collect import Collection, collect
from lightning_muon.monitoring.observed import ObservedOptimizer
from lightning_muon.monitoring.request import Mode, Request
from lightning_muon.monitoring.session import Session, Sighting
from lightning_muon.monitoring.subject import Subject

__all__ = ["Collection", "Mode", "ObservedOptimizer", "Request", "Session", "Sighting", "Subject", "collect"]
