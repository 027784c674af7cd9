"""Gradient norms and clipping that mean what they mean on one process, although only owners hold gradients."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_muon.local import local
from lightning_muon.muon import Muon

__all__ = ["ClipScope", "clip_grad_norm_", "grad_norm", "grad_norms"]

ClipScope = Literal["all", "adamw", "none"]
_ALGORITHMS = ("muon", "adamw")


@torch.no_grad()
def grad_norms(optimizer: Muon, norm_type: float = 2.0) -> dict[str, Tensor]:
    """The norms of the averaged gradient, equal on every process, after backward: of ``"all"`` parameters, of those
    that ``"muon"`` updates, and of those that ``"adamw"`` updates.

    Under a sharded strategy a process holds the gradient of what it owns, and zeros elsewhere: Lightning's
    ``grad_norm`` and ``torch.nn.utils.clip_grad_norm_`` would see that part only. Every process must call this one.

    Args:
        optimizer: The optimizer whose parameters count; bare, not wrapped.
        norm_type: The order; ``inf`` for the largest absolute value.

    Returns:
        Float32 scalars.

    Raises:
        RuntimeError: The gradients have not been averaged over the processes.
    """
    optimizer.partition.check_gradients()
    local = torch.stack([_local_norm(optimizer, algorithm, norm_type) for algorithm in _ALGORITHMS])
    if math.isinf(norm_type):
        norms = optimizer.partition.maximum(local)
    else:
        norms = (optimizer.partition.total(local.double() ** norm_type) ** (1.0 / norm_type)).float()
    return {"all": torch.linalg.vector_norm(norms, norm_type), **dict(zip(_ALGORITHMS, norms, strict=True))}


def grad_norm(optimizer: Muon, norm_type: float = 2.0) -> Tensor:
    """The norm of the whole averaged gradient, a float32 scalar. See ``grad_norms``."""
    return grad_norms(optimizer, norm_type)["all"]


@torch.no_grad()
def clip_grad_norm_(
    optimizer: Muon,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    scope: ClipScope = "all",
) -> Tensor:
    """Scale the gradient so that its norm is at most ``max_norm``, as ``torch.nn.utils.clip_grad_norm_`` does.

    Neither Muon's nor AdamW's update depends on the size of all gradients so far; clipping changes how much one step
    weighs in the running averages. A gradient whose norm is not finite is left as it is: scaling would spread the NaN
    to all parameters, and the optimizer's own policy could not say where it comes from.

    Args:
        optimizer: The optimizer whose parameters are clipped; bare, not wrapped.
        max_norm: The largest norm to leave.
        norm_type: The order of the norm.
        error_if_nonfinite: Raise rather than leave such a gradient to the optimizer.
        scope: ``"all"`` parameters by their common norm; those of ``"adamw"`` by theirs, so that neither algorithm's
            gradients shrink the other's; or ``"none"``, to have the norms without clipping.

    Returns:
        The norm before clipping of what is clipped, of all for ``"none"``. ``optimizer.last_grad_norms`` keeps all of
        ``grad_norms``.

    Raises:
        RuntimeError: The norm is not finite and ``error_if_nonfinite``; on every process.
        ValueError: An unknown scope.
    """
    if scope not in get_args(ClipScope):
        raise ValueError(f"clip_scope={scope!r} is not known; choose one of {', '.join(get_args(ClipScope))}.")
    norms = grad_norms(optimizer, norm_type)
    norm = norms["adamw" if scope == "adamw" else "all"]
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} of the gradients is not finite, so they cannot be clipped. Pass"
            " error_if_nonfinite=False to go on all the same."
        )
    if scope != "none":
        # torch's formula; what is not finite counts as 0, so that it stays as it is
        factor = (max_norm / (norm.nan_to_num(nan=0.0, posinf=0.0) + 1e-6)).clamp(max=1.0)
        for name, param in optimizer.named_parameters():
            if param.grad is not None and scope in ("all", optimizer.routes[name].algorithm):
                gradient = local(param.grad)
                gradient.mul_(factor.to(gradient.device))
    optimizer.last_grad_norms.update(norms)
    return norm


def _local_norm(optimizer: Muon, algorithm: str, norm_type: float) -> Tensor:
    inverse = 0.0 if math.isinf(norm_type) else 1.0 / norm_type
    norms = [
        # the sum over the ranks meets each element as often as there are copies
        torch.linalg.vector_norm(run, norm_type, dtype=torch.float32) / optimizer.partition.copies(name) ** inverse
        for name, param in optimizer.named_parameters()
        if optimizer.routes[name].algorithm == algorithm
        for run in optimizer.local_gradients(name, param)
    ]
    device = next(optimizer.named_parameters())[1].device
    return torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros((), device=device)
