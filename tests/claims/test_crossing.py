"""Where a loss is reached, by hand."""

import math

import pytest

from benchmarks.claims.crossing import Crossing, crossing, smallest_sure


def test_between_two_shares() -> None:
    losses = {1.0: 1.0, 0.4: 2.0, 0.6: 1.5}  # in any order
    assert crossing(losses, 1.6).share == pytest.approx(0.56)
    assert crossing(losses, 1.1).share == pytest.approx(0.92)
    assert not crossing(losses, 1.6).is_bound


def test_on_a_share() -> None:
    losses = {0.4: 2.0, 0.6: 1.5, 1.0: 1.0}
    assert crossing(losses, 1.5).share == pytest.approx(0.6)
    assert crossing(losses, 2.0) == Crossing(0.4, is_bound=True)


def test_below_the_smallest_and_never() -> None:
    losses = {0.4: 2.0, 0.6: 1.5, 1.0: 1.0}
    assert crossing(losses, 3.0) == Crossing(0.4, is_bound=True)
    assert crossing(losses, 0.9) == Crossing(None)


def test_the_last_crossing_counts() -> None:
    losses = {0.4: 2.0, 0.5: 1.4, 0.6: 1.6, 1.0: 1.0}
    assert crossing(losses, 1.5).share == pytest.approx(0.6 + 0.4 * 1 / 6)
    assert crossing({**losses, 0.4: 1.0}, 1.5) == crossing(losses, 1.5)  # below at the smallest share, and above again
    assert crossing({**losses, 1.0: 1.7}, 1.5) == Crossing(None)


def test_no_line_leads_from_a_run_that_diverged() -> None:
    assert crossing({0.4: math.inf, 0.6: 1.5, 1.0: 1.0}, 1.6) == Crossing(0.6)
    assert crossing({0.4: 1.5, 0.6: 1.5, 1.0: math.inf}, 1.6) == Crossing(None)


def test_nothing_tried() -> None:
    with pytest.raises(ValueError, match="no share"):
        crossing({}, 1.0)


def test_smallest_sure() -> None:
    target = {1: 1.0, 2: 2.0}
    losses = {0.4: {1: 0.9, 2: 2.0}, 0.5: {1: 0.9, 2: 1.9}, 0.6: {1: 0.8, 2: 1.8}}
    assert smallest_sure(losses, target) == 0.5  # at 0.4 the second seed is not below, but equal
    assert smallest_sure({0.4: losses[0.4]}, target) is None
    assert smallest_sure({**losses, 0.55: {1: 1.1, 2: 1.9}}, target) == 0.6  # all larger shares must be below too
    assert smallest_sure({**losses, 0.7: {1: 0.8, 2: math.inf}}, target) is None
