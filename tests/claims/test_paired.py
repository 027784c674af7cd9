"""Differences over seeds against the sums written out, and Student's t against its density, integrated."""

import math

import pytest

from benchmarks.claims.paired import Spread, p_below, paired


def integrated(t: float, degrees: int, parts: int = 20_000) -> float:
    """P(T ≤ t): the density's integral over the angle whose tangent is t/√ν, which is finite."""
    low, high = -math.pi / 2, math.atan(t / math.sqrt(degrees))
    constant = math.gamma((degrees + 1) / 2) / (math.sqrt(math.pi) * math.gamma(degrees / 2))
    width = (high - low) / parts
    return constant * width * sum(math.cos(low + (part + 0.5) * width) ** (degrees - 1) for part in range(parts))


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("t", [-7.5, -1.0, 0.0, 0.3, 2.5])
def test_p_below(t: float, degrees: int) -> None:
    assert p_below(t, degrees) == pytest.approx(integrated(t, degrees), abs=1e-7)


def test_p_below_of_the_tables() -> None:
    assert p_below(-2.919986, 2) == pytest.approx(0.05, abs=1e-6)
    assert p_below(-2.131847, 4) == pytest.approx(0.05, abs=1e-6)


def test_paired() -> None:
    found = paired({1: 1.0, 2: 2.0, 3: 2.5}, {1: 1.1, 2: 1.9, 3: 2.9})
    assert found.differences == pytest.approx({1: -0.1, 2: 0.1, 3: -0.4})
    mean = -0.4 / 3
    sd = math.sqrt(((-0.1 - mean) ** 2 + (0.1 - mean) ** 2 + (-0.4 - mean) ** 2) / 2)
    assert found.mean == pytest.approx(mean)
    assert found.sd == pytest.approx(sd)
    assert found.standard_error == pytest.approx(sd / math.sqrt(3))
    assert found.t == pytest.approx(mean / (sd / math.sqrt(3)))
    assert found.p_below == pytest.approx(integrated(mean / (sd / math.sqrt(3)), 2), abs=1e-7)
    assert found.seeds_below == 2
    assert found.seeds_above == 1


def test_seeds_are_matched_by_number_and_not_by_order() -> None:
    assert paired({1: 1.0, 2: 5.0}, {2: 6.0, 1: 2.0}).differences == {1: -1.0, 2: -1.0}


def test_one_seed_and_equal_differences_have_no_t() -> None:
    one, equal = paired({1: 1.0}, {1: 2.0}), paired({1: 1.0, 2: 2.0}, {1: 2.0, 2: 3.0})
    assert (one.mean, one.sd, one.t, one.p_below, one.seeds_below) == (-1.0, None, None, None, 1)
    assert (equal.mean, equal.sd, equal.t, equal.p_below, equal.seeds_below) == (-1.0, 0.0, None, None, 2)
    same = paired({1: 1.0, 2: 3.0}, {1: 1.0, 2: 2.0})
    assert (same.seeds_below, same.seeds_above) == (0, 1)  # an equal loss is neither


@pytest.mark.parametrize(
    ("a", "b"), [({}, {}), ({1: 1.0}, {2: 1.0}), ({1: 1.0, 2: 1.0}, {1: 1.0}), ({1: math.inf}, {1: 1.0})]
)
def test_what_cannot_be_paired(a: dict[int, float], b: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="paired: "):
        paired(a, b)


def test_spread() -> None:
    assert Spread.of([1.0, 2.0, 4.0]).text() == f"2.333 ± {math.sqrt(7 / 3):.3f}"
    assert Spread.of([1.0]).text(1) == "1.0"
