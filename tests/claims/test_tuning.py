"""The search over two learning rates, on losses that are known everywhere."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest

from benchmarks.claims.tuning import Grid, Rates, tune

START = Grid((1.0, 2.0, 4.0, 8.0), (1.0, 2.0, 4.0))


class Asked:
    """Losses by name, and every question."""

    def __init__(self, **losses: Callable[[Rates], float]) -> None:
        self.losses, self.points = losses, []

    def __call__(self, points: Sequence[tuple[str, Rates]]) -> list[float]:
        self.points += points
        return [self.losses[name](rates) for name, rates in points]


def valley(lr: float, adamw_lr: float) -> Callable[[Rates], float]:
    return lambda rates: math.log2(rates.lr / lr) ** 2 + math.log2(rates.adamw_lr / adamw_lr) ** 2


def test_best_inside_needs_the_grid_alone() -> None:
    asked = Asked(muon=valley(2, 2))
    found = tune({"muon": START}, asked)["muon"]
    assert found.best == Rates(2.0, 2.0)
    assert not found.is_on_edge
    assert sorted(rates[:2] for _, rates in asked.points) == sorted(itertools.product(START.lrs, START.adamw_lrs))


@pytest.mark.parametrize("best", [(0.25, 2.0), (32.0, 2.0), (2.0, 0.5), (4.0, 16.0), (0.5, 16.0)])
def test_grid_grows_until_the_best_is_inside_and_stays_a_full_grid(best: tuple[float, float]) -> None:
    asked = Asked(muon=valley(*best))
    found = tune({"muon": START}, asked)["muon"]
    assert found.best == Rates(*best)
    assert not found.is_on_edge
    tried = [rates for _, rates in asked.points]
    assert len(tried) == len(set(tried))
    lrs, adamw_lrs = {rates.lr for rates in tried}, {rates.adamw_lr for rates in tried}
    assert set(tried) == set(found.losses)
    assert {rates[:2] for rates in tried} == set(itertools.product(lrs, adamw_lrs))
    assert min(lrs) < best[0] < max(lrs)
    assert min(adamw_lrs) < best[1] < max(adamw_lrs)


def test_initial_scales_are_tried_with_all_rates_and_do_not_grow() -> None:
    def losses(rates: Rates) -> float:
        return valley(2, 8)(rates) + abs(rates.initializer_range - 0.1)

    found = tune({"adamw": Grid(START.lrs, START.adamw_lrs, (0.02, 0.1))}, Asked(adamw=losses))["adamw"]
    assert found.best == Rates(2.0, 8.0, 0.1)
    assert {rates.initializer_range for rates in found.losses} == {0.02, 0.1}
    assert len(found.losses) == 4 * 5 * 2
    assert not found.is_on_edge


def test_best_at_one_scale_is_of_that_scale_and_says_if_it_is_on_the_edge() -> None:
    def losses(rates: Rates) -> float:
        at_usual_scale = rates.initializer_range == 0.02
        return valley(4, 1)(rates) + 1 if at_usual_scale else valley(2, 2)(rates)

    found = tune({"adamw": Grid(START.lrs, START.adamw_lrs, (0.02, 0.1))}, Asked(adamw=losses))["adamw"]
    assert (found.best, found.is_on_edge) == (Rates(2.0, 2.0, 0.1), False)
    usual, other = found.at(0.02), found.at(0.1)
    assert (usual.best, usual.is_on_edge) == (Rates(4.0, 1.0, 0.02), True)
    assert len(usual.losses) == 12
    assert (other.best, other.is_on_edge) == (found.best, False)
    with pytest.raises(ValueError, match=r"no run began at the scale 0\.5"):
        found.at(0.5)


def test_one_rate_at_one_scale_has_one_edge() -> None:
    found = tune({"one": Grid((1.0, 2.0, 4.0), (None,))}, Asked(one=lambda rates: abs(math.log2(rates.lr / 2))))["one"]
    assert (found.at(0.02).best, found.at(0.02).is_on_edge) == (Rates(2.0, None), False)


def test_searches_grow_by_themselves() -> None:
    asked = Asked(muon=valley(2, 2), adamw=valley(8, 2))
    found = tune({"muon": START, "adamw": START}, asked)
    assert len(found["muon"].losses) == 12
    assert len(found["adamw"].losses) == 15
    assert found["adamw"].best == Rates(8.0, 2.0)


def test_one_rate_is_no_dimension_to_grow_in() -> None:
    found = tune({"one": Grid((1.0, 2.0), (None,))}, Asked(one=lambda rates: abs(math.log2(rates.lr / 4))))["one"]
    assert found.best == Rates(4.0, None)
    assert set(found.losses) == {Rates(lr, None) for lr in (1.0, 2.0, 4.0, 8.0)}


def test_end_of_growth_is_said() -> None:
    found = tune({"muon": START}, Asked(muon=valley(64, 2)), max_growths=1)["muon"]
    assert found.best == Rates(16.0, 2.0)
    assert found.is_on_edge


def test_a_diverged_run_is_never_the_best() -> None:
    found = tune({"muon": START}, Asked(muon=lambda rates: math.inf if rates.lr > 2 else valley(2, 2)(rates)))["muon"]
    assert found.best == Rates(2.0, 2.0)
    with pytest.raises(ValueError, match="every run of 'muon' diverged"):
        tune({"muon": START}, Asked(muon=lambda rates: math.inf))
