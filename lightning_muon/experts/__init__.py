"""How a mixture of experts uses its experts: loads and routing, counted where the routers choose."""

from lightning_muon.experts.loads import ExpertLoads
from lightning_muon.experts.reading import Read

__all__ = ["ExpertLoads", "Read"]
