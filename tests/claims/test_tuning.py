"""The search over two learning rates, on losses that are known everywhere."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest

from benchmarks.claims.tuning import FINALISTS, MARGIN, Grid, Rates, Try, Tuned
from benchmarks.claims.tuning import tune as tune_on

START = Grid((1.0, 2.0, 4.0, 8.0), (1.0, 2.0, 4.0))


class Asked:
    """Losses by name, and every question."""

    def __init__(self, **losses: Callable[[Rates], float]) -> None:
        self.losses, self.points = losses, []

    def __call__(self, tries: Sequence[Try]) -> list[float]:
        self.points += [one[:2] for one in tries]
        return [self.losses[one.search](one.rates) for one in tries]


def tune(grids: dict[str, Grid], losses_of: Asked, max_growths: int | None = None) -> dict[str, Tuned]:
    """On one seed."""
    return tune_on(grids, losses_of, [7], max_growths)


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


def noisy(rates: Rates, seed: int) -> float:
    """Seed 1 favours what is bad on the others."""
    lucky = {Rates(4.0, 2.0): 0.5, Rates(2.0, 4.0): 0.3}
    return valley(2, 2)(rates) / 10 + (-lucky.get(rates, 0) if seed == 1 else lucky.get(rates, 0))


def test_best_is_that_with_the_lowest_mean_of_the_finalists() -> None:
    asked: list[Try] = []

    def losses_of(tries: Sequence[Try]) -> list[float]:
        asked.extend(tries)
        return [noisy(one.rates, one.seed) for one in tries]

    found = tune_on({"muon": START}, losses_of, [1, 2, 3])["muon"]
    assert tune_on({"muon": START}, losses_of, [1])["muon"].best == Rates(4.0, 2.0)
    assert found.best == Rates(2.0, 2.0)
    finalists = {rates for rates, by_seed in found.losses.items() if set(by_seed) == {1, 2, 3}}
    lowest = sorted(found.losses, key=lambda rates: noisy(rates, 1))[:FINALISTS]
    assert finalists == set(lowest)
    assert all(set(by_seed) == {1} for rates, by_seed in found.losses.items() if rates not in finalists)
    first_search = asked[: len(START.points()) + 2 * FINALISTS]
    assert len(set(first_search)) == len(first_search)
    for rates, by_seed in found.losses.items():
        assert by_seed == {seed: noisy(rates, seed) for seed in by_seed}


def test_what_one_seed_cannot_tell_apart_is_repeated_on_the_others() -> None:
    """Six points within the margin, the best of them the sixth on the first seed; one right above it."""
    first = [1.0 + MARGIN * step for step in (0, 0.1, 0.2, 0.3, 0.9, 1.0, 1.1)]
    grid = Grid((1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0), (None,))
    points = [2.0, 4.0, 8.0, 16.0, 1.0, 32.0, 64.0]

    def losses_of(tries: Sequence[Try]) -> list[float]:
        return [first[points.index(t.rates.lr)] if t.seed == 1 else 1.0 - (t.rates.lr == 32.0) for t in tries]

    found = tune_on({"muon": grid}, losses_of, [1, 2, 3])["muon"]
    assert found.best.lr == 32.0
    assert {rates.lr for rates, by_seed in found.losses.items() if len(by_seed) == 3} == {
        1.0,
        2.0,
        4.0,
        8.0,
        16.0,
        32.0,
    }


def test_grid_grows_around_the_mean_and_not_around_the_luckiest() -> None:
    def losses_of(tries: Sequence[Try]) -> list[float]:
        lucky = Rates(8.0, 4.0)  # the corner
        return [valley(2, 2)(one.rates) - 10 * (one.rates == lucky and one.seed == 1) for one in tries]

    assert len(tune_on({"muon": START}, losses_of, [1, 2, 3])["muon"].losses) == len(START.points())
    assert len(tune_on({"muon": START}, losses_of, [1])["muon"].losses) > len(START.points())


def test_finalist_that_diverges_on_another_seed_is_not_the_best() -> None:
    def losses_of(tries: Sequence[Try]) -> list[float]:
        return [math.inf if t.seed == 2 and t.rates.lr == 2 else valley(2, 2)(t.rates) for t in tries]

    assert tune_on({"muon": START}, losses_of, [1, 2])["muon"].best.lr in (1.0, 4.0)
    with pytest.raises(ValueError, match="every run of 'muon' diverged"):
        tune_on({"muon": START}, lambda tries: [math.inf if t.seed == 2 else 1.0 for t in tries], [1, 2])
