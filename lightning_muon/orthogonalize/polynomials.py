"""The polynomial sequences Muon orthogonalises with, each with its source and what it guarantees.

One step of a sequence maps every singular value σ of a matrix to ``aσ + bσ³ + cσ⁵``; a sequence is the composition
of its steps. Inputs are normalised to ``‖X‖_F = 1 / safety`` first, so that all σ lie in ``[0, 1]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PolynomialSequence", "Steps", "available_sequences", "polynomial_sequence"]

Steps = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class PolynomialSequence:
    """A named composition of odd quintic polynomials.

    Attributes:
        name: The name in the registry.
        steps: ``(a, b, c)`` per step, in order.
        source: Where the coefficients are published.
        guarantee: ``(smallest σ, lowest output, highest output)``: every normalised singular value in
            ``[smallest σ, 1]`` ends in ``[lowest output, highest output]``, in exact arithmetic. ``None`` where
            nothing is known.
        safety: The input is divided by ``safety · ‖X‖_F``; head-room for rounding above σ = 1.
    """

    name: str
    steps: Steps
    source: str
    guarantee: tuple[float, float, float] | None = None
    safety: float = 1.0

    def __call__(self, sigma: float) -> float:
        """The output singular value of a Frobenius-normalised singular value ``sigma``."""
        value = sigma / self.safety
        for a, b, c in self.steps:
            value = value * (a + b * value**2 + c * value**4)
        return value


def _divide_all_but_last(steps: Steps, safety: float) -> Steps:
    """Polar Express' safety: evaluate each step but the last at σ/safety."""
    safe = tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in steps[:-1])
    return (*safe, steps[-1])


_KELLER = (3.4445, -4.7750, 2.0315)

# Polar Express (arXiv 2505.16932), built for σ ≥ 1e-3; the list of the authors' reference code, before its safety.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)

_SEQUENCES = (
    PolynomialSequence(
        "keller5",
        (_KELLER,) * 5,
        "Keller Jordan, Muon; torch.optim.Muon; Moonlight (arXiv 2502.16982)",
        guarantee=(1e-2, 0.68, 1.21),
    ),
    PolynomialSequence(
        "you5",
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        "You Jiacheng, modded-nanogpt PR 81",
        guarantee=(1e-2, 0.97, 1.04),
    ),
    PolynomialSequence(
        "polar_express5",
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        "Polar Express (arXiv 2505.16932) for σ ≥ 1e-3 and 5 steps, safety and cushion 2 %; modded-nanogpt",
        guarantee=(1e-3, 0.84, 1.15),
        safety=1.02,
    ),
    PolynomialSequence(
        "polar_express8",
        _divide_all_but_last(_POLAR_EXPRESS, 1.01),
        "Polar Express (arXiv 2505.16932), reference code with its safety of 1 %",
        guarantee=(1e-3, 0.99, 1.01),
        safety=1.01,
    ),
    PolynomialSequence(
        "deepseek_v4",
        (_KELLER,) * 8 + ((2.0, -1.5, 0.5),) * 2,
        "DeepSeek-V4 (arXiv 2606.19348): eight steps to approach 1, two to settle on it",
        guarantee=(1e-3, 0.99, 1.01),
    ),
    PolynomialSequence(
        "cubic5",
        (
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ),
        "How Much Orthogonalization Does Muon Need? (arXiv 2606.00371)",
        guarantee=(7e-3, 0.76, 1.31),
    ),
)
_BY_NAME = {sequence.name: sequence for sequence in _SEQUENCES}


def available_sequences() -> tuple[str, ...]:
    """The names that ``orthogonalization=`` accepts, besides a sequence of ``(a, b, c)``."""
    return (*_BY_NAME, "exact")


def polynomial_sequence(orthogonalization: str | Sequence[Sequence[float]]) -> PolynomialSequence | None:
    """Look up or check an ``orthogonalization`` argument.

    Args:
        orthogonalization: A name from ``available_sequences``, or the ``(a, b, c)`` of each step.

    Returns:
        The sequence, or ``None`` for ``"exact"``, which is no polynomial.

    Raises:
        ValueError: The name is unknown, or a step is not three finite numbers.
    """
    if isinstance(orthogonalization, str):
        if orthogonalization == "exact":
            return None
        if orthogonalization not in _BY_NAME:
            raise ValueError(
                f"orthogonalization={orthogonalization!r} is not known. Choose one of"
                f" {', '.join(available_sequences())}, or give a sequence of (a, b, c)."
            )
        return _BY_NAME[orthogonalization]
    steps = []
    for step in orthogonalization:
        values = tuple(float(value) for value in step)
        if len(values) != 3 or not all(map(math.isfinite, values)):
            raise ValueError(f"Each step of `orthogonalization` is three finite numbers (a, b, c); got {step!r}.")
        steps.append((values[0], values[1], values[2]))
    if not steps:
        raise ValueError("`orthogonalization` needs at least one step (a, b, c).")
    return PolynomialSequence("custom", tuple(steps), "given by the caller")
