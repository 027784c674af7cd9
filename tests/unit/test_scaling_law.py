"""The law recovers what was planted, says how sure it is, and warns where it must."""

import math

import numpy as np
import pytest

from lightning_muon.orthogonalize import available_sequences, orthogonalization_flops, polynomial_sequence
from lightning_muon.scaling import fit_power_law, smallest_sequence
from lightning_muon.scaling.sequences import resolution_limit
from lightning_muon.scaling.student import t_quantile, t_within

SIZES = [1e6, 3e6, 1e7, 3e7, 1e8]
LADDERS = 2000
# 95 % of 2,000 and four standard deviations of a binomial's to each side
LOW, HIGH = (LADDERS * 0.95 + side * 4 * math.sqrt(LADDERS * 0.95 * 0.05) for side in (-1, 1))


def noisy(exponent, coefficient, sizes, scale, rng):
    sizes = np.asarray(sizes)
    return coefficient * sizes**-exponent * np.exp(scale * rng.standard_normal(len(sizes)))


@pytest.mark.parametrize(
    ("degrees", "expected"),  # printed tables, two-sided 95 %
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (8, 2.306), (29, 2.045), (30, 2.042), (120, 1.980)],
)
def test_t_quantiles_are_those_of_the_tables(degrees, expected):
    assert t_quantile(0.95, degrees) == pytest.approx(expected, abs=5.1e-4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 10])
def test_t_is_the_integral_of_its_density(degrees):
    t = np.linspace(0, 2.5, 200_001)
    density = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    density = density * (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
    assert t_within(2.5, degrees) == pytest.approx(2 * np.trapezoid(density, t), abs=1e-9)


@pytest.mark.parametrize(("exponent", "coefficient"), [(0.25, 0.5), (0.96, 3e4), (0.0, 1.0), (-0.4, 1e-3)])
def test_an_exact_law_is_found_exactly(exponent, coefficient):
    law = fit_power_law(SIZES, [coefficient * size**-exponent for size in SIZES])
    assert law.exponent.value == pytest.approx(exponent, abs=1e-12)
    assert law.coefficient.value == pytest.approx(coefficient, rel=1e-10)
    assert law.exponent.low <= law.exponent.value <= law.exponent.high < law.exponent.low + 1e-10
    assert law.predict(1e12).value == pytest.approx(coefficient * 1e12**-exponent, rel=1e-10)
    assert np.abs(law.residuals).max() < 1e-12
    assert law.num_sizes == 5
    assert not law.is_curved
    assert not law.warnings(1e9)


def test_figures_of_a_small_example_by_hand():
    """log2 size 0, 1, 2, 3 and log2 y 0, -1, -1, -2: slope -0.6, mean -1, residual squares 0.2 (times log(2)²)."""
    law = fit_power_law([8, 1, 4, 2], [0.25, 1.0, 0.5, 0.5])
    assert law.sizes == (1, 2, 4, 8)
    assert law.values == (1.0, 0.5, 0.5, 0.25)
    assert law.exponent.value == pytest.approx(0.6)
    variance = 0.2 / 2
    t = 4.302652729749
    assert law.exponent.high - law.exponent.value == pytest.approx(t * math.sqrt(variance / 5))
    assert law.exponent.value - law.exponent.low == pytest.approx(t * math.sqrt(variance / 5))
    assert law.r_squared == pytest.approx(1 - 0.2 / 2)
    assert law.residuals == pytest.approx([x * math.log(2) for x in (0.1, -0.3, 0.3, -0.1)])
    assert [local.slope for local in law.local_slopes] == pytest.approx([-1, 0, -1])
    assert [(local.smaller, local.larger) for local in law.local_slopes] == [(1, 2), (2, 4), (4, 8)]
    at_one = math.log2(law.coefficient.value), math.log2(law.coefficient.high)
    assert at_one[0] == pytest.approx(-0.1)
    assert at_one[1] - at_one[0] == pytest.approx(t * math.sqrt(variance * (1 / 4 + 1.5**2 / 5)))
    predicted = law.predict(32)
    assert math.log2(predicted.value) == pytest.approx(-3.1)
    half = t * math.sqrt(variance * (1 + 1 / 4 + 3.5**2 / 5))
    assert math.log2(predicted.high) == pytest.approx(-3.1 + half)
    assert math.log2(predicted.low) == pytest.approx(-3.1 - half)


@pytest.mark.parametrize("sizes", [SIZES, [1e6, 1e6, 1e6, 1e7, 1e7, 1e8, 2e8]], ids=["one run each", "seeds"])
def test_intervals_hold_what_they_should_as_often_as_they_say(sizes):
    """Over 2,000 ladders with a planted law: its exponent, its coefficient, one more run, and curvature 0."""
    rng = np.random.default_rng(1)
    held = np.zeros(4, dtype=int)
    for _ in range(LADDERS):
        law = fit_power_law(sizes, noisy(0.25, 0.5, sizes, 0.08, rng))
        predicted, (another,) = law.predict(2e9), noisy(0.25, 0.5, [2e9], 0.08, rng)
        held += (
            law.exponent.low <= 0.25 <= law.exponent.high,
            law.coefficient.low <= 0.5 <= law.coefficient.high,
            predicted.low <= another <= predicted.high,
            not law.is_curved,
        )
    assert (held > LOW).all(), held
    assert (held < HIGH).all(), held


def test_runs_of_one_size_are_points_of_their_own():
    law = fit_power_law([1e6, 1e6, 1e7, 1e7], [1.0, 4.0, 0.5, 0.125])
    assert len(law.residuals) == 4
    assert law.num_sizes == 2
    (local,) = law.local_slopes  # from the geometric mean 2 to 0.25
    assert local.slope == pytest.approx(math.log10(0.25 / 2))


def test_a_curved_law_warns():
    x = np.log(np.asarray(SIZES) / 1e6)
    rng = np.random.default_rng(2)
    law = fit_power_law(SIZES, np.exp(-0.3 * x - 0.12 * x**2 + 0.02 * rng.standard_normal(5)))
    assert law.is_curved
    assert law.curvature.low <= -0.24 <= law.curvature.high
    (warning,) = law.warnings(1e9)
    assert "curved" in warning


def test_a_far_target_warns():
    law = fit_power_law(SIZES, [size**-0.25 for size in SIZES])
    assert not law.warnings(1e9)
    (warning,) = law.warnings(1.1e9)
    assert "11 times the largest size" in warning


def test_few_sizes_warn_and_cannot_show_curvature():
    law = fit_power_law(SIZES[:3] * 2, [1, 0.5, 0.2, 1.1, 0.4, 0.2])
    assert law.curvature is None
    assert not law.is_curved
    (warning,) = law.warnings()
    assert "3 sizes" in warning


def test_two_runs_have_a_slope_and_no_interval():
    law = fit_power_law([1e6, 1e8], [1.0, 0.1])
    assert law.exponent.value == pytest.approx(0.5)
    assert (law.exponent.low, law.exponent.high) == (-math.inf, math.inf)
    predicted = law.predict(1e10)
    assert predicted.value == pytest.approx(0.01)
    assert (predicted.low, predicted.high) == (0, math.inf)


@pytest.mark.parametrize(
    ("sizes", "values", "message"),
    [
        ([1e6, 1e6], [1.0, 0.9], "at least 2 sizes"),
        ([], [], "at least 2 sizes"),
        ([1e6, 1e7], [1.0], "2 sizes and 1 values"),
        ([1e6, 1e7], [1.0, 0.0], "must be positive"),
        ([1e6, -1e7], [1.0, 0.5], "must be positive"),
        ([1e6, 1e7], [1.0, math.nan], "must be positive"),
    ],
)
def test_what_cannot_be_fitted_is_an_error(sizes, values, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(sizes, values)


@pytest.mark.parametrize("sigma", [1.0, 0.2, 0.03, 6e-3, 2e-3, 9e-4, 4e-4, 5e-5])
def test_the_chosen_sequence_resolves_and_no_cheaper_one_does(sigma):
    def resolves(sequence):
        outputs = [sequence(point) for point in np.geomspace(sigma, 1, 3000)]
        return outputs[0] >= 0.7 and max(outputs) <= 1.35

    made = [{"name": "polar_express", "steps": steps, "lower": min(sigma, 0.5)} for steps in range(1, 11)]
    names = [name for name in available_sequences() if name != "exact"]
    sequences = [polynomial_sequence(candidate) for candidate in [*names, *made]]
    costs = [orthogonalization_flops(64, 64, sequence) for sequence in sequences if resolves(sequence)]
    found = polynomial_sequence(smallest_sequence(sigma))
    assert resolves(found)
    assert orthogonalization_flops(64, 64, found) == min(costs)


def test_a_published_sequence_where_none_is_cheaper():
    assert smallest_sequence(4e-5) == {"name": "polar_express", "steps": 7, "lower": 4e-5}
    assert smallest_sequence(3.5e-2) == {"name": "polar_express", "steps": 3, "lower": 0.035}
    assert smallest_sequence(8e-4) == "polar_express5"


def test_no_sequence_reaches_everything():
    assert smallest_sequence(1e-8) is None
    assert smallest_sequence(2.0) == smallest_sequence(1.0)
    with pytest.raises(ValueError, match="is positive"):
        smallest_sequence(0.0)


def test_resolution_limit_is_where_the_output_passes_seven_tenths():
    limit = resolution_limit("polar_express5")
    sequence = polynomial_sequence("polar_express5")
    assert sequence(limit) >= 0.7 > sequence(limit * 0.99)


@pytest.mark.parametrize("values", [(0.1, 0.09, 0.08), (0.08, 0.09, 0.1)])
def test_a_steep_law_of_sizes_close_together_can_be_evaluated(values):
    """Its value at size 1 is beyond float64; between its runs it is not."""
    law = fit_power_law([1e6, 1.0005e6, 1.001e6], values)
    assert law.predict(1.0005e6).value == pytest.approx(0.09, rel=0.01)
    assert any("span a factor of 1" in text for text in law.warnings())


def test_a_wide_ladder_is_not_called_narrow():
    assert not any("span" in text for text in fit_power_law([1e6, 2e6, 3e6, 4e6], [4.0, 3.0, 2.0, 1.0]).warnings())
