"""Gradient norms and clipping that mean what they mean on one process, although only owners hold gradients."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_muon.muon import Muon

__all__ = ["clip_grad_norm_", "grad_norm"]


@torch.no_grad()
def grad_norm(optimizer: Muon, norm_type: float = 2.0, group: dist.ProcessGroup | None = None) -> Tensor:
    """The norm of the whole averaged gradient, equal on every rank, after backward. A collective.

    Args:
        optimizer: The optimizer whose parameters count.
        norm_type: The order; ``inf`` for the largest absolute value.
        group: The process group; ``None`` is the default one.

    Returns:
        A float32 scalar.
    """
    runs = [run for name, param in optimizer.named_parameters() for run in optimizer.local_gradients(name, param)]
    device = next(iter(optimizer.named_parameters()))[1].device
    norms = [torch.linalg.vector_norm(run, norm_type, dtype=torch.float32) for run in runs]
    local = torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros((), device=device)
    if math.isinf(norm_type):
        dist.all_reduce(local, dist.ReduceOp.MAX, group=group)
        return local
    powers = local.double() ** norm_type
    dist.all_reduce(powers, group=group)
    return (powers ** (1.0 / norm_type)).float()


@torch.no_grad()
def clip_grad_norm_(
    optimizer: Muon,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Scale the gradient so that its norm is at most ``max_norm``, as ``torch.nn.utils.clip_grad_norm_`` does.

    Muon's update does not depend on the size of a matrix's gradient: here clipping only changes how much a step
    weighs in the momentum. AdamW's parameters feel it as usual. A gradient whose norm is not finite is left as it is:
    scaling would spread the NaN to all parameters, and the optimizer's own policy could not say where it comes from.

    Returns:
        The norm before clipping.

    Raises:
        RuntimeError: The norm is not finite and ``error_if_nonfinite``; on every rank.
    """
    norm = grad_norm(optimizer, norm_type, group)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} of the gradients is not finite, so they cannot be clipped. Pass"
            " error_if_nonfinite=False to go on all the same."
        )
    params = [param for _, param in optimizer.named_parameters()]
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm.nan_to_num(nan=0.0, posinf=0.0))
    return norm
