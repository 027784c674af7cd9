"""One process: the time of an optimizer step on the example's model, against torch's optimizers.

``python -m benchmarks.optimizer_step [--json benchmarks/results/optimizer_step.json]``

``torch.optim.Muon`` takes 2-D parameters only, so it gets each expert as a parameter of its own; both run the same
coefficients (``keller5``) in the same dtype. Weights, gradients and everything else are equal.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import lightning_muon as lm
from benchmarks.timing import report, time_alternating
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MoELM(ModelConfig())
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    routes = lm.Muon(model).routes
    separate, rest = [], []
    for name, param in model.named_parameters():
        gradient = param.grad
        assert gradient is not None
        if routes[name].algorithm == "adamw":
            rest.append(param)
            continue
        stack = (param, gradient) if param.ndim == 3 else (param[None], gradient[None])
        for matrix, its_gradient in zip(*stack, strict=True):
            separate.append(nn.Parameter(matrix.detach().clone()))
            separate[-1].grad = its_gradient.clone()
    torch_muon, torch_adamw = torch.optim.Muon(separate), torch.optim.AdamW(rest)

    def step_torch() -> None:
        torch_muon.step()  # type: ignore[no-untyped-call]
        torch_adamw.step()

    fp32, bf16 = torch.float32, torch.bfloat16
    steps: dict[str, Callable[[], object]] = {
        "torch Muon + AdamW (bf16)": step_torch,
        "lm.Muon keller5 bf16": lm.Muon(model, orthogonalization="keller5", orthogonalization_dtype=bf16).step,
        "lm.Muon keller5 fp32": lm.Muon(model, orthogonalization="keller5", orthogonalization_dtype=fp32).step,
        "lm.Muon polar_express5 fp32": lm.Muon(model).step,
        "torch AdamW": torch.optim.AdamW(model.parameters()).step,
    }
    seconds = time_alternating(steps, options.rounds)
    title = f"optimizer step, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, one thread"
    report(title, seconds, "torch Muon + AdamW (bf16)", options.json)


if __name__ == "__main__":
    main()
