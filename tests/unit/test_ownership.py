"""The plan, with integers only."""

import itertools
import random
import subprocess
import sys

import pytest

from lightning_muon.sharding.ownership import ElementRun, Unit, plan_ownership


def random_units(seed, count=12):
    rng = random.Random(seed)
    units, total = [], 0
    for number in range(count):
        size = rng.randint(1, 50)
        units.append(Unit(f"w{number}", 0, size, rng.randint(1, 100) * size, 4 * size))
        total += size
    return units


def runs(*numels):
    return [ElementRun(f"v{number}", numel, 8) for number, numel in enumerate(numels)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_element_has_exactly_one_owner(world_size):
    stack = [Unit("experts", 10 * e, 10 * (e + 1), 5, 40) for e in range(8)]
    plan = plan_ownership(random_units(0) + stack, runs(1, 64, 1000, 13, 0), world_size)
    numels = {u.parameter: u.stop for u in random_units(0)} | {
        "experts": 80,
        "v0": 1,
        "v1": 64,
        "v2": 1000,
        "v3": 13,
        "v4": 0,
    }
    assert plan.slices.keys() == numels.keys()
    for name, slices in plan.slices.items():
        assert slices[0].start == 0
        assert slices[-1].stop == numels[name]
        assert all(a.stop == b.start for a, b in itertools.pairwise(slices))
        assert all(0 <= s.owner < world_size for s in slices)
    assert sum(plan.flops) == sum(u.flops for u in random_units(0)) + 40
    assert sum(plan.state_bytes) == sum(u.state_bytes for u in random_units(0)) + 320 + 8 * 1078


@pytest.mark.parametrize("seed", range(20))
def test_makespan_is_within_grahams_bound(seed):
    world_size = 3
    units = random_units(seed, count=8)
    best = min(
        max(sum(u.flops for u, owner in zip(units, owners, strict=True) if owner == rank) for rank in range(world_size))
        for owners in itertools.product(range(world_size), repeat=len(units))
    )
    plan = plan_ownership(units, [], world_size)
    assert max(plan.flops) <= (4 / 3 - 1 / (3 * world_size)) * best


def test_units_are_never_cut_and_neighbours_stay_together():
    stack = [Unit("experts", 10 * e, 10 * (e + 1), 5, 40) for e in range(8)]
    plan = plan_ownership(stack, [], 4)
    assert [(s.start, s.stop) for s in plan.slices["experts"]] == [(0, 20), (20, 40), (40, 60), (60, 80)]


def test_elements_level_the_bytes():
    units = [Unit("big", 0, 1000, 100, 4000), Unit("small", 0, 100, 10, 400)]
    plan = plan_ownership(units, runs(300, 500), 2)
    assert max(plan.state_bytes) - min(plan.state_bytes) <= 2 * 64 * 8
    indivisible = [ElementRun("whole", 800, 8, divisible=False)]
    assert len(plan_ownership(units, indivisible, 2).slices["whole"]) == 1


def test_fewer_matrices_than_ranks_and_none():
    plan = plan_ownership([Unit("w", 0, 9, 7, 36)], [], 4)
    assert sorted(plan.flops) == [0, 0, 0, 7]
    assert plan_ownership([], [], 3).state_bytes == (0, 0, 0)


def test_plan_does_not_depend_on_the_process():
    code = (
        "from tests.unit.test_ownership import random_units, runs; "
        "from lightning_muon.sharding.ownership import plan_ownership; "
        "print(plan_ownership(random_units(3), runs(100, 7), 4).digest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert digests == {plan_ownership(random_units(3), runs(100, 7), 4).digest() + "\n"}
