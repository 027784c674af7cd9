"""Laws over compute, the ratio at equal loss, and the rates of sizes that were not tuned."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.claims import scaling_law
from benchmarks.claims.compute_ratio import compute_ratios, equal_loss_ratio, published_ratio
from benchmarks.claims.trend import rates_at
from benchmarks.claims.tuning import Rates
from tests.claims.conftest import ROOT

SIZES = {32: 1e-9, 64: 1e-8, 128: 1e-7, 256: 1e-6}


def losses(coefficient: float, exponent: float, noise: float = 0.0, seed: int = 0) -> dict[int, dict[int, float]]:
    generator = np.random.default_rng(seed)
    return {
        width: {s: coefficient * c**-exponent * math.exp(noise * generator.normal()) for s in (1, 2, 3)}
        for width, c in SIZES.items()
    }


@pytest.mark.parametrize(
    ("c", "expected"), [(1, 0.464), (3, 0.484), (5, 0.494), (10, 0.507), (18, 0.519), (100, 0.554)]
)
def test_published_fits_give_the_ratios_that_follow_from_them(c: float, expected: float) -> None:
    assert published_ratio(c) == pytest.approx(expected, abs=1e-3)


def test_ratio_is_where_both_laws_have_one_loss() -> None:
    muon, adamw = (1.1, 0.06), (1.3, 0.055)
    ratio = equal_loss_ratio(1e-7, muon, adamw)
    assert muon[0] * (ratio * 1e-7) ** -muon[1] == pytest.approx(adamw[0] * 1e-7 ** -adamw[1])


def test_ratios_of_exact_laws_are_exact_and_their_intervals_empty() -> None:
    found = compute_ratios(SIZES, losses(1.1, 0.06), losses(1.3, 0.055))
    for width, one in found.items():
        expected = equal_loss_ratio(SIZES[width], (1.1, 0.06), (1.3, 0.055))
        assert [one["ratio"], one["low"], one["high"]] == pytest.approx([expected] * 3, rel=1e-6)


def test_interval_widens_with_the_seeds_scatter_and_holds_the_truth() -> None:
    found = compute_ratios(SIZES, losses(1.1, 0.06, 0.003, seed=1), losses(1.3, 0.06, 0.003, seed=2))
    truth = (1.1 / 1.3) ** (1 / 0.06)
    for one in found.values():
        assert one["low"] < one["ratio"] < one["high"]
    assert found[64]["low"] < truth < found[64]["high"]
    wider = compute_ratios(SIZES, losses(1.1, 0.06, 0.03, seed=1), losses(1.3, 0.06, 0.03, seed=2))
    assert wider[64]["high"] - wider[64]["low"] > 3 * (found[64]["high"] - found[64]["low"])


def test_seeds_are_paired() -> None:
    """What a seed does to both optimizers alike moves the ratio less than what it does to each by itself."""

    def widths(shift_of_adamw: dict[int, float]) -> float:
        shifts = ({1: 1.0, 2: 1.01, 3: 0.99}, shift_of_adamw)
        muon, adamw = (
            {w: {s: loss * shift[s] for s, loss in by_seed.items()} for w, by_seed in losses(c, 0.06).items()}
            for c, shift in zip((1.1, 1.3), shifts, strict=True)
        )
        one = compute_ratios(SIZES, muon, adamw)[64]
        return one["high"] - one["low"]

    assert widths({1: 1.0, 2: 1.01, 3: 0.99}) < 0.5 * widths({1: 1.0, 2: 0.99, 3: 1.01})


def test_rates_of_a_larger_size_follow_the_trend() -> None:
    tuned = {32: Rates(8e-3, 1e-2), 64: Rates(4e-3, 1e-2), 128: Rates(2e-3, 1e-2)}
    assert rates_at(64, tuned) == tuned[64]
    assert rates_at(256, tuned)[:2] == pytest.approx((1e-3, 1e-2))
    assert rates_at(256, {32: Rates(8e-3, 1e-2)}) == Rates(8e-3, 1e-2)
    tuned = {32: Rates(8e-3, 1e-2, 0.02), 64: Rates(4e-3, 1e-2, 0.1)}
    assert rates_at(256, tuned).initializer_range == 0.1
    with pytest.raises(ValueError, match="no size was tuned"):
        rates_at(64, {})


def test_tokens_are_proportional_to_active_parameters() -> None:
    widths = (32, 64, 96)
    ratios = [scaling_law.num_steps(w, 600) / scaling_law.active_parameters(w) for w in widths]
    assert ratios == pytest.approx([600 / scaling_law.active_parameters(64)] * 3, rel=5e-3)


def test_whole_way(tmp_path: Path) -> None:
    arguments = ["--steps", "6", "--seeds", "1", "2", "--grid", "tiny", "--max-growths", "0", "--val-windows", "4"]
    arguments += ["--widths", "32", "48", "64", "--tune-up-to", "32", "--files", str(ROOT / "docs" / "fsdp.md")]
    arguments += ["--folder", str(tmp_path / "runs"), "--devices", "cpu", "--picture", str(tmp_path / "law.png")]
    results = scaling_law.run(arguments)
    assert [size["is_tuned"] for size in results["sizes"]] == [True, False, False]
    assert set(results["val_loss"]["muon"]) == {"32", "48", "64"}
    assert len(results["compute_ratio"]) == 3
    assert (tmp_path / "law.png").stat().st_size > 10_000
    assert "Muon's compute / AdamW's" in scaling_law.tables(results)
