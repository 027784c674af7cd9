"""Gradient norms and clipping that mean what they mean on one process, although only owners hold gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_muon.muon import Muon

__all__ = ["clip_grad_norm_", "grad_norm"]


@torch.no_grad()
def grad_norm(optimizer: Muon, norm_type: float = 2.0) -> Tensor:
    """The norm of the whole averaged gradient, equal on every process, after backward.

    Under a sharded strategy a process holds the gradient of what it owns, and zeros elsewhere: Lightning's
    ``grad_norm`` and ``torch.nn.utils.clip_grad_norm_`` would see that part only. Every process must call this one.

    Args:
        optimizer: The optimizer whose parameters count; bare, not wrapped.
        norm_type: The order; ``inf`` for the largest absolute value.

    Returns:
        A float32 scalar.
    """
    runs = [run for name, param in optimizer.named_parameters() for run in optimizer.local_gradients(name, param)]
    device = next(iter(optimizer.named_parameters()))[1].device
    norms = [torch.linalg.vector_norm(run, norm_type, dtype=torch.float32) for run in runs]
    local = torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros((), device=device)
    if math.isinf(norm_type):
        return optimizer.partition.maximum(local)
    powers = optimizer.partition.total(local.double() ** norm_type)
    return (powers ** (1.0 / norm_type)).float()


@torch.no_grad()
def clip_grad_norm_(
    optimizer: Muon, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale the gradient so that its norm is at most ``max_norm``, as ``torch.nn.utils.clip_grad_norm_`` does.

    Neither Muon's nor AdamW's update depends on the size of all gradients so far; clipping changes how much one step
    weighs in the running averages. A gradient whose norm is not finite is left as it is: scaling would spread the NaN
    to all parameters, and the optimizer's own policy could not say where it comes from.

    Returns:
        The norm before clipping, which ``optimizer.last_grad_norm`` keeps.

    Raises:
        RuntimeError: The norm is not finite and ``error_if_nonfinite``; on every process.
    """
    norm = grad_norm(optimizer, norm_type)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} of the gradients is not finite, so they cannot be clipped. Pass"
            " error_if_nonfinite=False to go on all the same."
        )
    params = [param for _, param in optimizer.named_parameters()]
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm.nan_to_num(nan=0.0, posinf=0.0))
    optimizer.last_grad_norm = norm
    return norm
