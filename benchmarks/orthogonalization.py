"""One process and thread: the speed of the orthogonalisation against ``torch.optim.Muon``'s own function.

``python -m benchmarks.orthogonalization [--json benchmarks/results/orthogonalization.json]``

Stacks of random matrices, as the optimizer batches them. torch's function takes one matrix and always computes in
bfloat16; it is called in a loop. Both run ``keller5``, whose coefficients are torch's, and then ours its default
sequence; "default" is the precision that is chosen on this machine. In turns, medians of the ratios. The last column is
the spectrum that ``"auto"`` looks at now and then, in times of the iteration.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

import lightning_muon as lm
from benchmarks.timing import time_alternating, write
from lightning_muon.orthogonalize import default_dtype, polynomial_sequence, relative_singular_values
from lightning_muon.orthogonalize.dispatch import uses_gram

KELLER = polynomial_sequence("keller5")
# batch, rows, cols; what they are
SHAPES = {
    (1, 128, 128): "the example's attention",
    (8, 128, 128): "the example's experts",
    (1, 128, 384): "the example's dense layer",
    (1, 64, 192): "the example's latent keys and values",
    (1, 8, 128): "the example's router",
    (16, 256, 256): "square",
    (4, 512, 2048): "small MLP",
    (2, 1024, 4096): "MLP",
    (16, 512, 256): "experts",
    (64, 256, 128): "many small experts",
    (16, 64, 1024): "heads",
    (1, 1408, 2048): "an expert of Moonlight",
}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="about, per shape: large ones get fewer rounds, 3 at least"
    )
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'':14}{'':38}{'torch':>10}  ours, times as fast")
    rows = []
    for shape, meaning in SHAPES.items():
        rows.append(measure(torch.randn(shape, device=options.accelerator), options.rounds, options.seconds))
        row = {**rows[-1], "meaning": meaning}
        ways = "  ".join(f"{name} {way['speed']:.2f}x ({way['way']})" for name, way in row["ours"].items())
        look = f"spectrum {row['spectrum_over_polar_express5']:.2f}"
        print(f"{'x'.join(map(str, shape)):14}{meaning:38}{row['torch_ms']:>8.1f}ms  {ways}  {look}", flush=True)
    if options.json is not None:
        write(options.json, rows=rows)


def measure(x: Tensor, rounds: int, seconds: float) -> dict[str, Any]:
    """Times of torch's function and of ours in both precisions, in turns."""
    low, default = torch.bfloat16, default_dtype(x)
    ours: dict[str, tuple[str, torch.dtype]] = {
        "keller5 bfloat16": ("keller5", low),
        "keller5 default": ("keller5", default),
        "polar_express5 bfloat16": ("polar_express5", low),
        "polar_express5 default": ("polar_express5", default),
    }
    calls: dict[str, Callable[[], object]] = {"torch": partial(_synchronized, torchs, x)}
    for name, (sequence, dtype) in ours.items():
        calls[name] = partial(_synchronized, lm.orthogonalize, x, sequence, dtype=dtype)
    calls["spectrum"] = partial(_synchronized, relative_singular_values, x)
    once = sum(time_alternating(calls, 1, warmup=1)[name][0] for name in calls)
    times = time_alternating(calls, max(3, min(rounds, round(seconds / once))), warmup=0)
    reference = statistics.median(times["torch"])
    looks = [a / b for a, b in zip(times["spectrum"], times["polar_express5 default"], strict=True)]
    return {
        "shape": list(x.shape),
        "rounds": len(times["torch"]),
        "torch_ms": 1e3 * reference,
        "spectrum_over_polar_express5": statistics.median(looks),
        "ours": {
            name: {
                "ms": 1e3 * statistics.median(times[name]),
                "speed": statistics.median(a / b for a, b in zip(times["torch"], times[name], strict=True)),
                "speeds": [a / b for a, b in zip(times["torch"], times[name], strict=True)],
                "dtype": str(dtype),
                "way": _way(x, sequence, dtype),
            }
            for name, (sequence, dtype) in ours.items()
        },
    }


def torchs(x: Tensor) -> list[Tensor]:
    """A loop of what ``torch.optim.Muon`` calls for each matrix."""
    assert KELLER is not None
    return [_zeropower_via_newtonschulz(matrix, KELLER.steps[0], len(KELLER.steps), 1e-7) for matrix in x]


def _synchronized(function: Callable[..., object], *arguments: Any, **options: Any) -> None:
    function(*arguments, **options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _way(x: Tensor, name: str, dtype: torch.dtype) -> str:
    sequence = polynomial_sequence(name)
    assert sequence is not None
    short, long = sorted(x.shape[-2:])
    return "Gram" if uses_gram(short, long, sequence, dtype) else "standard"


if __name__ == "__main__":
    main()
