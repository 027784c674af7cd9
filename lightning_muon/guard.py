"""Gradients that are not finite: found on all processes together, before anything is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lightning_muon.muon import Muon

__all__ = ["gradients_are_finite", "nonfinite_error"]


def gradients_are_finite(optimizer: Muon) -> bool:
    """Whether all gradients of all processes are; every process must ask. Waits for the device."""
    flat = [run for name, param in optimizer.named_parameters() for run in optimizer.local_gradients(name, param)]
    device = next(optimizer.named_parameters())[1].device
    largest = torch.nn.utils.get_total_norm(flat, float("inf")) if flat else torch.zeros((), device=device)
    is_broken = (~largest.isfinite()).to(device, torch.float32)
    return not optimizer.partition.maximum(is_broken).item()


def nonfinite_error(optimizer: Muon) -> FloatingPointError:
    """The error that names what this process knows to be broken."""
    names = [
        name
        for name, param in optimizer.named_parameters()
        if not all(run.isfinite().all() for run in optimizer.local_gradients(name, param))
    ]
    return FloatingPointError(
        f"Gradients that are not finite, in {', '.join(names) or 'parameters of another process'}. Neither weights"
        " nor optimizer state have been changed. Look for the cause (learning rate, data, 16-bit overflow), or"
        " pass nonfinite='skip' to lm.Muon to leave such steps out."
    )
