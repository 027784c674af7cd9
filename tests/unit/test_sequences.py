"""The polynomial sequences: coefficients against their sources, guarantees, head-room, and how they are named."""

import math

import numpy as np
import pytest
import torch

import lightning_muon as lm
from lightning_muon.orthogonalize import (
    Auto,
    PolynomialSequence,
    auto_settings,
    available_sequences,
    check_range,
    nominal_sequence,
    plain,
    polar_express,
    polynomial_sequence,
    same_orthogonalization,
)
from lightning_muon.orthogonalize.generator import best_quintic, compose

POLYNOMIALS = [name for name in available_sequences() if name != "exact"]
# not offered: CANS (arXiv 2506.10935), and what goes with AOL scaling, used without it
CANS = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)
AOL = (
    (4.0098, -7.0585, 2.4635),
    (3.4585, -5.5479, 2.5959),
    (2.7573, -3.2939, 1.4254),
    (2.7215, -3.0494, 1.3169),
)
# NoahAmsel/PolarExpress, the list in its code before the safety
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_guarantee_holds(name):
    sequence = polynomial_sequence(name)
    smallest, low, high = sequence.guarantee
    outputs = [sequence(s) for s in np.geomspace(smallest, 1.0, 20001)]
    assert min(outputs) >= low
    assert max(outputs) <= high


@pytest.mark.parametrize(("name", "threshold"), [("keller5", 2.07e-4), ("you5", 2.03e-4), ("deepseek_v4", 1.26e-6)])
def test_failure_threshold_is_the_published_one(name, threshold):
    """Where f(σ) reaches 0.1: "Spectral Scaling Laws of Muon", recomputed."""
    sequence = polynomial_sequence(name)
    assert sequence(threshold * 0.98) < 0.1 < sequence(threshold * 1.02)


def test_keller5_is_torchs_set():
    from torch.optim import _muon

    torch_steps = ((_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C),) * _muon.DEFAULT_NS_STEPS
    assert polynomial_sequence("keller5").steps == torch_steps


def test_the_generator_makes_the_published_polar_express():
    np.testing.assert_allclose(polar_express(5, 1e-3).steps, polynomial_sequence("polar_express5").steps, rtol=1e-12)
    found, _ = compose(7, 1e-3, cushion=0.02407327424182761, safety=1.0)
    np.testing.assert_allclose(found[:6], POLAR_EXPRESS[:6], rtol=1e-12)
    # next to 1 the equations are singular in float64; the published digits end here as well
    np.testing.assert_allclose(found[6], POLAR_EXPRESS[6], rtol=1e-10)
    divided = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR_EXPRESS]
    np.testing.assert_allclose(polynomial_sequence("polar_express8").steps[:7], divided, rtol=1e-12)


@pytest.mark.parametrize(("lower", "upper"), [(1e-3, 1.0), (0.03, 1.0), (0.3, 1.7), (0.9, 1.1), (1 - 1e-6, 1.0)])
def test_best_quintic_cannot_be_improved(lower, upper):
    """The largest deviation is a convex function of the coefficients: where no small change helps, none does."""
    x = np.linspace(lower, upper, 20001)
    basis = np.stack([x, x**3, x**5])

    def deviation(coefficients):
        return np.abs(1 - np.asarray(coefficients) @ basis).max()

    found = best_quintic(lower, upper)
    generator = np.random.default_rng(0)
    for size in (1e-2, 1e-4):
        for change in generator.normal(size=(200, 3)):
            assert deviation(found * (1 + size * change)) >= deviation(found) * (1 - 1e-9) - 1e-15


@pytest.mark.parametrize("steps", range(1, 11))
@pytest.mark.parametrize("lower", [0.2, 1e-2, 1e-4])
def test_guarantee_of_what_the_generator_makes(steps, lower):
    sequence = polar_express(steps, lower)
    smallest, low, high = sequence.guarantee
    outputs = [sequence(s) for s in np.geomspace(smallest, 1.0, 5001)]
    assert smallest == lower
    assert len(sequence.steps) == steps
    assert min(outputs) >= low - 1e-12
    assert max(outputs) <= high + 1e-12


def test_a_composition_is_built_for_its_length():
    """Made for the number of steps it has, the best is far better than the beginning of a longer one."""
    truncated = PolynomialSequence("truncated", polynomial_sequence("polar_express8").steps[:3], "", safety=1.01)
    sigma = np.geomspace(0.02, 1, 2001)
    assert max(abs(1 - truncated(s)) for s in sigma) > 0.8
    assert max(abs(1 - polar_express(3, 0.02)(s)) for s in sigma) < 0.13


HEAD_ROOM = {
    "keller5": 1.264,
    "you5": 1.325,
    "polar_express5": 1.042,
    "polar_express8": 1.021,
    "deepseek_v4": 1.264,
    "cubic5": 1.0035 * 1.01,
}


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_head_room(name):
    sequence = polynomial_sequence(name)
    assert sequence.head_room() == pytest.approx(HEAD_ROOM[name], abs=1e-3)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        check_range(sequence, dtype)


def test_unsafe_sequences_are_refused():
    with pytest.raises(ValueError, match=r"does not keep a normalised singular value of 0\.88\d"):
        lm.orthogonalize(torch.eye(3), AOL)
    with pytest.raises(ValueError, match=r"up to σ = 1\.000.* only, and rounding in torch.bfloat16 reaches 1\.0117"):
        lm.orthogonalize(torch.eye(3), CANS, dtype=torch.bfloat16)
    bare_cubic = polynomial_sequence("cubic5").steps
    with pytest.raises(ValueError, match="safety"):
        lm.orthogonalize(torch.eye(3), bare_cubic, dtype=torch.bfloat16)
    lm.orthogonalize(torch.eye(3), bare_cubic, dtype=torch.float32)
    (a, b, c), *rest = bare_cubic  # what the message says to do
    safe = [(a / 1.02, b / 1.02**3, c / 1.02**5), *rest]
    lm.orthogonalize(torch.eye(3), safe, dtype=torch.bfloat16)


def test_an_unsafe_sequence_is_refused_when_the_optimizer_is_made():
    layer = torch.nn.Linear(4, 4, bias=False)
    with pytest.raises(ValueError, match="between 0 and 2: updates would turn around"):
        lm.Muon(layer, orthogonalization=AOL)
    with pytest.raises(ValueError, match=r"rounding in torch\.bfloat16"):
        lm.Muon(layer, orthogonalization=CANS, orthogonalization_dtype=torch.bfloat16)


def test_mappings_name_the_generator_and_the_norm():
    made = polynomial_sequence({"name": "polar_express", "steps": 6, "lower": 1e-4, "norm": "schatten4"})
    assert made == polar_express(6, 1e-4, norm="schatten4")
    keller = polynomial_sequence({"name": "keller5", "norm": "schatten4"})
    assert (keller.steps, keller.norm) == (polynomial_sequence("keller5").steps, "schatten4")
    assert polynomial_sequence({"name": "exact"}) is None
    assert auto_settings({"name": "auto", "quantile": 0.1, "every": 7}) == Auto(quantile=0.1, every=7)
    assert auto_settings("auto") == Auto()
    assert auto_settings("keller5") is None
    assert nominal_sequence("auto") == Auto().sequence(5)
    assert plain([[1, 2, 3]]) == ((1.0, 2.0, 3.0),)
    assert plain({"name": "auto"}) == {"name": "auto"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("keller", "Choose one of"),
        ([], "at least one"),
        ([(1.0, 2.0)], "three finite"),
        ([(1.0, 2.0, float("nan"))], "three finite"),
        ({"name": "polar_express"}, '"steps" and "lower"'),
        ({"name": "polar_express", "steps": 6, "lower": 1e-4, "safty": 1.0}, "does not know 'safty'"),
        ({"name": "polar_express", "steps": 0, "lower": 1e-4}, "between 1 and 12"),
        ({"name": "polar_express", "steps": 3, "lower": 1.5}, "between 0 and 1"),
        ({"name": "polar_express", "steps": 3, "lower": 0.1, "safety": 0.9}, r"safety=0.9 in \[1, 2\)"),
        ({"name": "polar_express", "steps": 3, "lower": 0.1, "norm": "max"}, "'frobenius' or 'schatten4'"),
        ({"name": "keller5", "norm": "max"}, "'frobenius' or 'schatten4'"),
        ({"name": "exact", "norm": "frobenius"}, "no arguments"),
        ({}, 'needs a "name"'),
        ({"name": "polar_express", "steps": "6", "lower": 1e-4}, "whole number"),
        ({"name": "polar_express", "steps": True, "lower": 1e-4}, "whole number"),
        ({"name": "polar_express", "steps": 6, "lower": "1e-4"}, "finite number"),
        ((3.4445, -4.7750, 2.0315), r"\[\(a, b, c\)\] \* 5"),
        (["auto"], "three finite"),
        ("auto", "no one sequence"),
    ],
)
def test_unknown_sequences_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        lm.orthogonalize(torch.eye(3), wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"quantile": 1.0}, "quantile=1.0"),
        ({"band": 0.0}, "band=0.0"),
        ({"every": 0}, "every=0"),
        ({"every": 2.5}, "every=2.5"),
        ({"most_steps": 1}, "most_steps=1"),
        ({"quantil": 0.1}, "does not know 'quantil'"),
        ({"quantile": "q90"}, "must be a number"),
    ],
)
def test_wrong_settings_of_auto_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        lm.Muon(torch.nn.Linear(4, 4), orthogonalization={"name": "auto", **wrong})


def test_slope_and_highest():
    sequence = polynomial_sequence("polar_express5")
    assert sequence.slope() == pytest.approx(sequence(1e-9) / 1e-9)
    assert sequence.slope() == pytest.approx(math.prod(a for a, _, _ in sequence.steps) / 1.02)
    grid = np.linspace(0, 1, 997)
    for number, highest in enumerate(sequence.highest()):
        assert max(list(sequence.path(s))[number] for s in grid) <= highest + 1e-4


@pytest.mark.parametrize("wrong", [None, 5, True])
def test_what_is_no_orthogonalization_at_all(wrong):
    with pytest.raises(TypeError, match="is not understood: give a name"):
        lm.Muon(torch.nn.Linear(4, 4), orthogonalization=wrong)


def test_the_same_in_other_words():
    full = {"name": "auto", "quantile": 0.1, "band": 0.1, "every": 100, "most_steps": 8}
    assert same_orthogonalization("auto", full)
    assert not same_orthogonalization("auto", {**full, "band": 0.2})
    assert same_orthogonalization("polar_express5", {"name": "polar_express", "steps": 5, "lower": 1e-3})
    assert not same_orthogonalization("polar_express5", {"name": "polar_express5", "norm": "schatten4"})
    assert same_orthogonalization("keller5", [(3.4445, -4.7750, 2.0315)] * 5)
    assert not same_orthogonalization("keller5", "exact")
    assert same_orthogonalization("exact", {"name": "exact"})


def test_resuming_under_another_wording():
    layers = [torch.nn.Linear(6, 4, bias=False) for _ in range(2)]
    first = lm.Muon(layers[0], orthogonalization="auto")
    second = lm.Muon(layers[1], orthogonalization={"name": "auto", "every": 100})
    second.load_state_dict(first.state_dict())
    third = lm.Muon(layers[1], orthogonalization={"name": "auto", "every": 50})
    with pytest.raises(ValueError, match="other hyper-parameters: orthogonalization"):
        third.load_state_dict(first.state_dict())


KELLER = (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize(
    "steps",
    [
        [KELLER] * 8 + [(-0.5, 1.5, 0.0)],  # turns what is below 1e-5 around
        [KELLER] * 6 + [(-0.5, 1.5, 0.0)],
        [(1e200, 1e200, 1e200)] * 3,
        [(3.0, 0.0, 0.0)],  # above 2 at 1
    ],
)
def test_no_direction_however_small_may_turn_around_or_explode(steps):
    with pytest.raises(ValueError, match="does not keep a normalised singular value"):
        lm.Muon(torch.nn.Linear(4, 4), orthogonalization=steps)


def test_steps_are_whole_numbers_whatever_was_asked_before():
    polar_express(7, 1e-3)
    with pytest.raises(ValueError, match=r"steps=7\.0"):
        polar_express(7.0, 1e-3)
