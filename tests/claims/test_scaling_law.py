"""Laws over compute, the ratio at equal loss, and the rates of sizes that were not tuned."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.claims import scaling_law
from benchmarks.claims.compute_ratio import compute_ratios, equal_loss_ratio, interpolated_ratio, published_ratio
from benchmarks.claims.setting import Setting
from benchmarks.claims.sizes import PFLOP_S_DAY, active_parameters, compute, geometry, num_steps, optimizer_compute
from benchmarks.claims.trend import rates_at
from benchmarks.claims.tuning import Rates
from lightning_muon.orthogonalize import nominal_sequence, orthogonalization_flops
from tests.claims.conftest import ROOT, few_steps

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
    found = compute_ratios(SIZES, SIZES, losses(1.1, 0.06), losses(1.3, 0.055))
    for width, one in found.items():
        expected = equal_loss_ratio(SIZES[width], (1.1, 0.06), (1.3, 0.055))
        assert [one["ratio"], one["low"], one["high"]] == pytest.approx([expected] * 3, rel=1e-6)


def test_interval_widens_with_the_seeds_scatter_and_holds_the_truth() -> None:
    found = compute_ratios(SIZES, SIZES, losses(1.1, 0.06, 0.003, seed=1), losses(1.3, 0.06, 0.003, seed=2))
    truth = (1.1 / 1.3) ** (1 / 0.06)
    for one in found.values():
        assert one["low"] < one["ratio"] < one["high"]
    assert found[64]["low"] < truth < found[64]["high"]
    wider = compute_ratios(SIZES, SIZES, losses(1.1, 0.06, 0.03, seed=1), losses(1.3, 0.06, 0.03, seed=2))
    assert wider[64]["high"] - wider[64]["low"] > 3 * (found[64]["high"] - found[64]["low"])


def test_interpolated_ratio_is_of_the_runs_alone() -> None:
    power_law = {c: 3.0 * c**-0.06 for c in (1e-9, 1e-8, 1e-7)}
    assert interpolated_ratio(5e-8, 3.0 * 2.5e-8**-0.06, power_law) == pytest.approx(0.5)
    assert interpolated_ratio(1e-8, power_law[1e-8], power_law) == pytest.approx(1.0)
    for beyond in (3.0 * 0.9e-9**-0.06, 3.0 * 1.1e-7**-0.06):
        assert interpolated_ratio(1e-8, beyond, power_law) is None


def test_seeds_are_paired() -> None:
    """What a seed does to both optimizers alike moves the ratio less than what it does to each by itself."""

    def widths(shift_of_adamw: dict[int, float]) -> float:
        shifts = ({1: 1.0, 2: 1.01, 3: 0.99}, shift_of_adamw)
        muon, adamw = (
            {w: {s: loss * shift[s] for s, loss in by_seed.items()} for w, by_seed in losses(c, 0.06).items()}
            for c, shift in zip((1.1, 1.3), shifts, strict=True)
        )
        one = compute_ratios(SIZES, SIZES, muon, adamw)[64]
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
    ratios = [num_steps(w, 600) / active_parameters(w) for w in widths]
    assert ratios == pytest.approx([600 / active_parameters(64)] * 3, rel=5e-3)


def test_muons_own_compute_moves_the_ratio_by_as_much() -> None:
    """An optimizer that doubles the compute of every size doubles what is needed for each loss."""
    muon, adamw = losses(1.1, 0.06), losses(1.3, 0.055)
    found = scaling_law.summarize(SIZES, SIZES, muon, adamw)
    for model, whole in zip(found["compute_ratio"], found["compute_ratio_with_optimizer"], strict=True):
        assert whole["ratio"] == pytest.approx(2 * model["ratio"])
        assert whole["pflop_s_days"] == model["pflop_s_days"]
    assert found["laws"]["muon_with_optimizer"]["exponent"] == pytest.approx(found["laws"]["muon"]["exponent"])


def test_compute_of_muons_step_is_that_of_its_iteration_on_every_matrix() -> None:
    width, steps = 32, 10
    run = Setting().run("muon", Rates(1e-2, 1e-2), 1, steps, model=geometry(width))
    sequence = nominal_sequence("polar_express5")
    squares = 3 * 4 + 2 * (8 + 1) * 3  # attention's in three layers; eight experts and a shared one in two
    others = 3 * orthogonalization_flops(4 * width, width, sequence) + 2 * orthogonalization_flops(8, width, sequence)
    flops = squares * 5 * 3 * 2 * width**3 + others  # of a square: five steps of three products
    assert optimizer_compute(run) * PFLOP_S_DAY == pytest.approx(steps * flops)
    assert optimizer_compute(run) / compute(run) == pytest.approx(0.18, abs=0.005)
    half = Setting().run("muon", Rates(1e-2, 1e-2), 1, steps, model=geometry(width), batch_size=8)
    assert optimizer_compute(half) == optimizer_compute(run)
    assert compute(half) == pytest.approx(compute(run) / 2)  # so the share goes with one over the tokens per step
    adamw = Setting().run("adamw", Rates(1e-2, 1e-2), 1, steps, model=geometry(width))
    assert optimizer_compute(adamw) == 0


def results_of(muon: dict, adamw: dict, diverged: dict | None = None) -> dict:
    """As they come out of the file."""
    sizes = [
        {"width": w, "active_parameters": 1, "steps": 1, "pflop_s_days": c, "pflop_s_days_of_muon": c / 2,
         "rates": {"muon": [1e-2, 1e-2], "adamw": [1e-2, 1e-2]}, "is_tuned": w < 100}
        for w, c in SIZES.items()
    ]  # fmt: skip
    both = [w for w in SIZES if w in muon and w in adamw]
    found = {"seeds": [1, 2, 3], "sizes": sizes, "val_loss": {"muon": muon, "adamw": adamw}, "diverged": diverged or {}}
    found["published"] = {"1.0": 0.464, "18.0": 0.519}
    if len(both) > 1:
        half = {w: c / 2 for w, c in SIZES.items()}
        found |= scaling_law.summarize(SIZES, half, {w: muon[w] for w in both}, {w: adamw[w] for w in both})
    return json.loads(json.dumps(found, allow_nan=False))


def test_findings_of_both_ratios(tmp_path: Path) -> None:
    factor = 0.8**0.06  # Muon needs 0.8 of the model's compute, and 1.2 with its step's
    found = results_of(losses(factor, 0.06), losses(1.0, 0.06))
    model, whole, size, *_ = scaling_law.findings(found)
    assert model.startswith("- Seen, by the model's compute, as the paper counts: Muon needs less")
    assert "By the laws the ratio is 0.80 to 0.80, its interval below 1 at 4 of 4 sizes; between Muon's own" in model
    assert "runs it is 0.80 to 0.80. 2 of all were tuned, and the others have rates by trend" in model
    assert whole.startswith("- Not seen, with the compute of Muon's step")
    assert "By the laws the ratio is 1.20 to 1.20, its interval below 1 at 0 of 4 sizes" in whole
    assert "by a factor of 1e+06" in size  # the largest is 1e-6
    text = scaling_law.tables(found)
    assert "| 32 | 0.80 | 0.80 – 0.80 | – | 1.20 | 1.20 – 1.20 | – |" in text
    assert "| 64 | 0.80 | 0.80 – 0.80 | 0.80 | 1.20 | 1.20 – 1.20 | 1.20 |" in text
    assert "| 128 | 1 | 1 | 8.6e+12 | 0.50 | by trend |" in text


def test_size_that_diverged_is_said_and_every_size_is_not_seen(tmp_path: Path) -> None:
    muon, adamw = losses(0.9, 0.06), losses(1.0, 0.06)
    del muon[256]
    found = results_of(muon, adamw, {"muon-256": [3]})
    said = scaling_law.findings(found)
    assert said[0] == "- muon-256: training diverged with seed 3; left out."
    assert said[1].startswith("- Not seen")
    assert "below 1 at 3 of 4 sizes" in said[1]
    assert "| diverged |" in scaling_law.tables(found)
    scaling_law.draw(found, tmp_path / "law.png")
    few = results_of({32: muon[32]}, adamw)
    assert "Too few sizes are left" in scaling_law.tables(few)
    scaling_law.draw(few, tmp_path / "law.png")


def test_whole_way(tmp_path: Path) -> None:
    arguments = few_steps(6, [1, 2], ROOT / "docs" / "fsdp.md", tmp_path / "runs")
    arguments += ["--widths", "32", "48", "64", "--tune-up-to", "32", "--picture", str(tmp_path / "law.png")]
    results = scaling_law.run(arguments)
    assert [size["is_tuned"] for size in results["sizes"]] == [True, False, False]
    assert set(results["val_loss"]["muon"]) == {"32", "48", "64"}
    assert len(results["compute_ratio"]) == len(results["compute_ratio_with_optimizer"]) == 3
    assert (tmp_path / "law.png").stat().st_size > 10_000
    assert "Muon's compute / AdamW's, of the model" in scaling_law.tables(results)
