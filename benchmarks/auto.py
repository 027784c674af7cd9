"""``orthogonalization="auto"`` against five uniform steps: how close to the polar factor, at which cost, and the loss.

``python -m benchmarks.auto [--json benchmarks/results/auto.json]``

First, how often the Gram iteration explodes on recorded momentum of the example (seed 1, steps 10, 50 and 250): the
distance of ``polar_express5`` in 16 bits, with given restarts, from the same iteration in float64 is above 0.6 of it.
Then on the same momentum: for every matrix the distance of the update from the exact polar factor ``UVᵀ`` (float64
singular value decomposition), relative, and its cosine; FLOPs of the iteration as printed, three products a step, so
that what is compared is the number of steps. 16-bit precisions are the
CPU's own: its products accumulate in float32 and are rounded once. Then whole trainings of 600 steps with both, on one
process and thread, with the same seeds: bits per byte on held-out files.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lightning_muon as lm
from benchmarks.momentum import matrices_of, recorded_momentum, train_example
from benchmarks.timing import write
from lightning_muon.matrices import MatrixKey
from lightning_muon.orthogonalize import (
    Auto,
    PolynomialSequence,
    orthogonalize_batch,
    polynomial_sequence,
    relative_singular_values,
)
from lightning_muon.orthogonalize.gram import gram_newton_schulz
from lightning_muon.orthogonalize.newton_schulz import newton_schulz, newton_schulz_flops

Recorded = Mapping[int, Sequence[tuple[str, Tensor]]]

STEPS = (10, 50, 250)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNIFORM = "polar_express5"
SETTINGS = (Auto(), Auto(quantile=0.05), Auto(quantile=0.1, band=0.2))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[1, 2, 3], help="of the trainings; none to leave them out"
    )
    parser.add_argument("--num-steps", type=int, default=600)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recorded = recorded_momentum(STEPS)
    figures: dict[str, Any] = {
        "explosions": explosion_table(recorded),
        "momentum": momentum_table(recorded),
        "training": training_table(options.seeds, options.num_steps),
    }
    if options.json is not None:
        write(options.json, **figures)


def explosion_table(recorded: Recorded) -> list[dict[str, Any]]:
    """How many matrices the Gram iteration ruins in 16 bits, a row for each precision and plan of restarts."""
    uniform = polynomial_sequence(UNIFORM)
    assert uniform is not None
    normalized = []
    for _, matrix in itertools.chain(*recorded.values()):
        wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT).double()
        normalized.append(wide / (wide.norm() * uniform.safety))
    expected = [newton_schulz(x, x @ x.mT, uniform.steps) for x in normalized]
    rows = []
    for dtype, plan in itertools.product((torch.float16, torch.bfloat16), ((2,), (2, 4), (1, 3), (1, 2, 3, 4))):
        errors = []
        for x, reference in zip(normalized, expected, strict=True):
            low = x.to(dtype)
            found = gram_newton_schulz(low, low @ low.mT, uniform.steps, plan).double()
            errors.append(((found - reference).norm() / reference.norm()).item())
        exploded = [error for error in errors if not error < 0.6]
        rows.append({"dtype": str(dtype), "restarts": plan, "matrices": len(errors), "exploded": len(exploded)})
        rows[-1] |= {"median": statistics.median(errors), "worst": max(errors)}
        print(
            f"Gram in {str(dtype)[6:]:>9} with restarts {plan!s:13} {len(exploded):>3} of {len(errors)} exploded"
            f"{f', by {min(exploded):.3g} to {max(exploded):.3g}' if exploded else ''};"
            f" distance median {statistics.median(errors):.3f}, worst {max(errors):.3g}"
        )
    return rows


def momentum_table(recorded_at: Recorded) -> list[dict[str, Any]]:
    """Accuracy and cost on recorded momentum, a row for each step, precision and choice."""
    uniform = polynomial_sequence(UNIFORM)
    assert uniform is not None
    rows = []
    print(f"{'':38}FLOPs  error: median    90 %   worst  worst cosine  update norm    steps: matrices")
    for step, recorded in recorded_at.items():
        matrices = [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT for _, matrix in recorded]
        factors = [u @ vh for u, _, vh in (torch.linalg.svd(m.double(), full_matrices=False) for m in matrices)]
        spectra = [relative_singular_values(matrix) for matrix in matrices]
        for dtype in DTYPES:
            choices = {UNIFORM: [uniform] * len(matrices)}
            choices[f"{UNIFORM}, Schatten-4"] = [_schatten(uniform)] * len(matrices)
            for auto in SETTINGS:
                looked_at = zip(matrices, spectra, strict=True)
                chosen = [auto.steps_for(sigma, (x.shape[0], x.shape[1]), dtype) for x, sigma in looked_at]
                choices[f"auto, {auto.quantile:g} to ±{auto.band:g}"] = [auto.sequence(k or 2) for k in chosen]
            for name, sequences in choices.items():
                row = {
                    "step": step,
                    "dtype": str(dtype),
                    "choice": name,
                    **_accuracy(matrices, factors, sequences, dtype),
                }
                row["flops_ratio"] = row["flops"] / _flops(matrices, choices[UNIFORM])
                rows.append(row)
                low, high = row["update_norm"]
                print(
                    f"{step:>4} {str(dtype)[6:]:>9} {name:22}{row['flops_ratio']:>6.2f}{row['error_median']:>15.3f}"
                    f"{row['error_90']:>8.3f}{row['error_worst']:>8.3f}{row['cosine_worst']:>14.3f}{low:>7.2f}{high:>7.2f}"
                    f"  {row['steps']}",
                    flush=True,
                )
    return rows


def _schatten(sequence: PolynomialSequence) -> PolynomialSequence:
    other = polynomial_sequence({"name": sequence.name, "norm": "schatten4"})
    assert other is not None
    return other


def _flops(matrices: Sequence[Tensor], sequences: Sequence[PolynomialSequence]) -> int:
    shaped = zip(matrices, sequences, strict=True)
    return sum(newton_schulz_flops(x.shape[0], x.shape[1], sequence.steps) for x, sequence in shaped)


def _accuracy(
    matrices: Sequence[Tensor], factors: Sequence[Tensor], sequences: Sequence[PolynomialSequence], dtype: torch.dtype
) -> dict[str, Any]:
    errors, cosines, norms = [], [], []
    for matrix, factor, sequence in zip(matrices, factors, sequences, strict=True):
        update = orthogonalize_batch(matrix[None], sequence, dtype)[0].double()
        errors.append(((update - factor).norm() / factor.norm()).item())
        cosines.append(((update * factor).sum() / update.norm() / factor.norm()).item())
        norms.append((update.norm() / factor.norm()).item())
    errors.sort()
    return {
        "matrices": len(matrices),
        "flops": _flops(matrices, sequences),
        "error_median": statistics.median(errors),
        "error_90": errors[int(0.9 * len(errors))],
        "error_worst": errors[-1],
        "cosine_worst": min(cosines),
        "update_norm": [min(norms), max(norms)],
        "steps": dict(sorted(Counter(len(sequence.steps) for sequence in sequences).items())),
    }


def training_table(seeds: Sequence[int], num_steps: int) -> list[dict[str, Any]]:
    """Bits per byte and FLOPs of whole trainings, a row for each seed and choice."""
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for orthogonalization in (UNIFORM, "auto"):
            counter = FlopCounter()
            bits = train_example(num_steps, seed=seed, after_step=counter, orthogonalization=orthogonalization)
            ratio = counter.flops / rows[-1]["flops"] if orthogonalization == "auto" else 1.0
            row = {"seed": seed, "choice": orthogonalization, "bits_per_byte": bits}
            rows.append({**row, "flops": counter.flops, "flops_ratio": ratio})
            print(
                f"seed {seed}, {orthogonalization:15}: {bits:.4f} bits per byte, {counter.flops:.4g} FLOPs", flush=True
            )
    return rows


class FlopCounter:
    """Adds up the iteration's FLOPs over a training, as printed: three products a step.

    Attributes:
        flops: So far.
    """

    def __init__(self) -> None:
        self.flops = 0
        self._shapes: dict[MatrixKey, tuple[int, ...]] = {}

    def __call__(self, step: int, optimizer: lm.Muon) -> None:
        """See what the last step has done."""
        if not self._shapes:
            self._shapes = {key: tuple(sorted(matrix.shape)) for key, matrix in matrices_of(optimizer).items()}
        for record in optimizer.update_records:
            assert record.sequence is not None
            for key in record.keys:
                short, long = self._shapes[key]
                self.flops += newton_schulz_flops(short, long, record.sequence.steps)


if __name__ == "__main__":
    main()
