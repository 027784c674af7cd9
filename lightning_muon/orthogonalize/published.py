"""The polynomial sequences in use, each with its source and what it guarantees.

Left out on purpose: CANS (arXiv 2506.10935), which sends a singular value of 1.004 to 1e57, and the set for AOL scaling
that some libraries use without that scaling, which turns directions above σ = 0.884 around. `check_range` refuses both.
"""

from __future__ import annotations

from lightning_muon.orthogonalize.sequence import PolynomialSequence, Steps

__all__ = ["PUBLISHED"]


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
        guarantee=(1e-2, 0.68, 1.14),
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
        guarantee=(1e-3, 0.999, 1.001),
        safety=1.01,
    ),
    PolynomialSequence(
        "deepseek_v4",
        (_KELLER,) * 8 + ((2.0, -1.5, 0.5),) * 2,
        "DeepSeek-V4 (arXiv 2606.19348): eight steps to approach 1, two to settle on it",
        guarantee=(1e-3, 0.999, 1.001),
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
        guarantee=(7.1e-3, 0.77, 1.31),
        safety=1.01,  # ours: without it σ = 1.004, one rounding in bfloat16, comes out negative
    ),
)
PUBLISHED = {sequence.name: sequence for sequence in _SEQUENCES}
