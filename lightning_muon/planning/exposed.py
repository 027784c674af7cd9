"""How long a step's optimizer and communication keep the model waiting: an estimate with few assumptions.

The formulas, with the figures of one rank from ``costs``::

    optimizer = Newton–Schulz FLOPs / device's FLOP/s
              + (3 · bytes of the weights it updates + 2 · bytes of its state) / memory bandwidth
    gradients = max(bytes sent, received) / link speed, less the time of backward
    weights   = max(bytes sent, received) / link speed, less the time of the next forward (muon_zero1 only)
    exposed   = the slowest rank's gradients + the slowest rank's optimizer + the slowest rank's weights
    forward   = 2 · active parameters · tokens / device's FLOP/s;  backward = 2 · forward

Weights and gradients are read once and weights written once (3), state is read and written (2). Without tokens, forward
and backward are unknown, and all communication counts as exposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_muon.planning.costs import RankCosts
from lightning_muon.planning.devices import Device

__all__ = ["ExposedTime", "Speeds", "exposed_time", "optimizer_seconds"]

# ZeroRedundancyOptimizer broadcasts within step(), before the next forward may begin; the ranks pass a broadcast on, so
# that its owner need not send it to everyone, and only what is received counts.
_BROADCASTS = {"adamw_zero1"}


@dataclass(frozen=True)
class Speeds:
    """What the estimate assumes.

    Attributes:
        device: The accelerator.
        link: Bytes/s that a rank sends and, at the same time, receives.
        tokens_per_rank: Tokens of a rank in a step; ``None`` if not known.
        active_parameters: Parameters that a token passes through.
    """

    device: Device
    link: float
    tokens_per_rank: int | None = None
    active_parameters: int = 0

    @property
    def forward(self) -> float:
        """Seconds of forward; 0 without tokens."""
        return 2 * self.active_parameters * (self.tokens_per_rank or 0) / self.device.flops

    @property
    def backward(self) -> float:
        """Seconds of backward; 0 without tokens."""
        return 2 * self.forward


@dataclass(frozen=True)
class ExposedTime:
    """Seconds of a step in which the model waits.

    Attributes:
        gradients: For gradients that backward did not hide.
        optimizer: For the slowest rank's optimizer.
        weights: For weights that the next forward did not hide.
    """

    gradients: float
    optimizer: float
    weights: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.gradients + self.optimizer + self.weights


def optimizer_seconds(costs: RankCosts, device: Device) -> float:
    """One rank's optimizer step."""
    moved = 3 * costs.weight_bytes + 2 * costs.state_bytes
    return costs.flops / device.flops + moved / device.memory_bandwidth


def exposed_time(scheme: str, ranks: Sequence[RankCosts], speeds: Speeds) -> ExposedTime:
    """The exposed time of a step under one of ``costs.SCHEMES``."""
    gradients = max(max(rank.sent_gradients, rank.received_gradients) for rank in ranks) / speeds.link
    if scheme in _BROADCASTS:
        weights = max(rank.received_weights for rank in ranks) / speeds.link
    else:
        sent_or_received = max(max(rank.sent_weights, rank.received_weights) for rank in ranks)
        weights = max(0.0, sent_or_received / speeds.link - speeds.forward)
    return ExposedTime(
        max(0.0, gradients - speeds.backward),
        max(optimizer_seconds(rank, speeds.device) for rank in ranks),
        weights,
    )
