"""The elementwise rules: momentum, scale, decay, AdamW. Pure arithmetic on tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

__all__ = ["SCALES", "adamw_", "apply_updates_", "momentum_", "state_dtypes", "update_scale"]

SCALES = ("match_rms_adamw", "original", "spectral")


def update_scale(scale: str, rows: int, cols: int) -> float:
    """The factor on the orthogonal update of a ``(rows, cols)`` matrix; rows are output features.

    - ``"match_rms_adamw"``: ``0.2·√max(rows, cols)``. A full-rank orthogonal matrix has RMS ``1/√max``, and AdamW's
      update an RMS of about 0.2 (Moonlight, arXiv 2502.16982, Lemma 1), so AdamW's learning rate carries over.
    - ``"original"``: ``√max(1, rows/cols)`` (Keller Jordan).
    - ``"spectral"``: ``√(rows/cols)``: the update's operator norm between RMS norms is 1 (arXiv 2310.17813).
    """
    if scale == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    if scale == "original":
        return math.sqrt(max(1.0, rows / cols))
    if scale == "spectral":
        return math.sqrt(rows / cols)
    raise ValueError(f"scale={scale!r} is not known; choose one of {', '.join(SCALES)}.")


def state_dtypes(algorithm: str, dtype: torch.dtype, master_weights: bool) -> dict[str, torch.dtype]:
    """What an algorithm keeps of every element of a parameter, and in which dtype.

    The momentum is float32 at least: Newton–Schulz lifts its small directions to full size, and with them whatever
    noise a 16-bit momentum would have gathered there. AdamW's averages have the dtype of the weight that is updated.

    Args:
        algorithm: `"muon"` or `"adamw"`.
        dtype: The parameter's.
        master_weights: Keep a float32 copy of 16-bit parameters.
    """
    wide = torch.promote_types(dtype, torch.float32)
    master = {"master_weight": wide} if master_weights and dtype != wide else {}
    if algorithm == "muon":
        return {"momentum_buffer": wide, **master}
    average = wide if master else dtype
    return {"exp_avg": average, "exp_avg_sq": average, **master}


def momentum_(buffers: list[Tensor], gradients: list[Tensor], momentum: float, nesterov: bool) -> Sequence[Tensor]:
    """``M ← μM + (1-μ)G`` in place; what is orthogonalised is ``(1-μ)G + μM`` (Nesterov) or ``M`` itself.

    This is ``torch.optim.Muon``'s form. It is ``(1-μ)`` times Moonlight's ``M ← μM + G``, ``G + μM``, and the polar
    factor does not see a factor. All tensors go through one call each: a model of experts has thousands.

    Args:
        buffers: The momenta, float32 at least.
        gradients: Same shapes as ``buffers``, any floating dtype; left untouched.

    Returns:
        What is orthogonalised: ``buffers`` themselves without Nesterov, so do not write to them.
    """
    exact = [gradient.to(buffer.dtype) for gradient, buffer in zip(gradients, buffers, strict=True)]
    torch._foreach_lerp_(buffers, exact, 1 - momentum)
    if not nesterov:
        return buffers
    if all(a is b for a, b in zip(exact, gradients, strict=True)):
        return torch._foreach_lerp(exact, buffers, momentum)
    own = [a.clone() if a is b else a for a, b in zip(exact, gradients, strict=True)]
    torch._foreach_lerp_(own, buffers, momentum)
    return own


def apply_updates_(
    weights: list[Tensor], updates: list[Tensor], *, lr: float, weight_decay: float, scale: float
) -> None:
    """``W ← W - lr·(scale·update + weight_decay·W)`` in place; decay knows the learning rate only, not the scale.

    A 16-bit weight is computed in float32 and rounded once.

    Args:
        weights: Of any floating dtypes.
        updates: Same shapes, all of one dtype.
    """
    exact = [weight.to(update.dtype) for weight, update in zip(weights, updates, strict=True)]
    torch._foreach_mul_(exact, 1 - lr * weight_decay)
    torch._foreach_add_(exact, updates, alpha=-lr * scale)
    for weight, result in zip(weights, exact, strict=True):
        if result is not weight:
            weight.copy_(result)


def adamw_(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Tensor | float]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """torch's own AdamW on tensors of any shape, in place.

    Args:
        params, gradients: Tensors of equal shapes, pairwise.
        states: ``exp_avg``, ``exp_avg_sq`` (like the parameter, updated) and ``step``, the steps before this one
            (a number, which the caller counts up).
    """
    adamw(
        list(params),
        list(gradients),
        [state["exp_avg"] for state in states],  # type: ignore[misc]
        [state["exp_avg_sq"] for state in states],  # type: ignore[misc]
        [],
        [torch.tensor(float(state["step"])) for state in states],
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=maximize,
    )
