"""What the experiments say of figures that are known: the sums, and when a claim is seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.claims import attention_logits, momentum_spectra, scale_rule, svd_entropy, weight_decay
from benchmarks.claims.run import Outcome
from tests.claims.conftest import tiny_run

ROUTER, QUERY, EXPERTS = (
    "model.layers.1.mlp.gate.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.experts.up_proj",
)


def outcome(measured: dict[str, list], **figures: object) -> Outcome:
    return Outcome(tiny_run(), {"measured": measured, "diverged": None, "val_loss": 1.0, **figures}, Path())


def test_svd_entropy() -> None:
    muon = {"1": {QUERY: 0.9, ROUTER: 0.5, f"{EXPERTS}.0": 0.8}, "2": {QUERY: 0.9, ROUTER: 0.6, f"{EXPERTS}.0": 0.8}}
    adamw = {"1": {QUERY: 0.8, ROUTER: 0.6, f"{EXPERTS}.0": 0.7}, "2": {QUERY: 0.8, ROUTER: 0.5, f"{EXPERTS}.0": 0.9}}
    found = svd_entropy.summarize(muon, adamw)
    assert found["AttnQO"]["share_higher"] == 1
    assert found["Router"]["share_higher"] == 0.5
    assert found["Router"]["muon"] == pytest.approx(0.55)
    assert found["Experts"]["smallest_difference"] == pytest.approx(-0.1)
    assert (found["all but routers"]["matrices"], found["all"]["matrices"]) == (2, 3)
    assert found["all but routers"]["share_higher"] == 0.75
    assert found["all but routers"]["muon"] == pytest.approx((0.9 + 0.8) / 2)  # the kinds' means
    assert found["all"]["adamw"] == pytest.approx((0.8 + 0.8 + 0.55) / 3)
    assert found["all"]["share_higher"] == pytest.approx(4 / 6)
    assert found["all"]["higher_by_seed"] == {"1": 2, "2": 2}
    said = svd_entropy.findings({"summary": found, "seeds": [1, 2], "diverged": {}})
    assert said[0].startswith("- Not seen")
    assert "75.0 %" in said[0]
    assert "50.0 %" in said[1]
    assert said[2] == "- The mean is not higher under Muon for Experts, Router."
    found["all but routers"]["share_higher"] = 0.901
    assert svd_entropy.findings({"summary": found, "seeds": [1, 2], "diverged": {}})[0].startswith("- Seen")
    gone = svd_entropy.findings({"summary": {}, "seeds": [1, 2], "diverged": {"adamw": [2]}})
    assert gone == ["- adamw: training diverged with seed 2; left out."]


def weight_decays(short_none: float, long_none: float, rms: float = 0.23, without: str = "") -> dict:
    losses = {"short, decay": {1: 1.5, 2: 1.5}, "long, decay": {1: 1.2, 2: 1.2}}
    losses |= {"short, none": {1: short_none, 2: 1.49}, "long, none": {1: long_none, 2: 1.21}}
    curves = {arm: {seed: [(5, 0.1), (10, 0.2)] for seed in (1, 2)} for arm in losses}
    curves["long, none"] = {1: [(5, 0.1), (10, rms)], 2: [(5, 0.1), (10, 0.37)]}
    curves["short, none"] = {seed: [(5, 0.1), (10, 0.22)] for seed in (1, 2)}
    if without:
        del losses[without], curves[without]
    found = {"summary": weight_decay.summarize(losses, curves), "seeds": [1, 2], "steps": 10, "long_steps": 50}
    found |= {"val_loss": losses, "weight_rms": curves, "diverged": {without: [2]} if without else {}}
    return json.loads(json.dumps(found))


def test_weight_decay() -> None:
    found = weight_decays(1.48, 1.23)
    assert found["summary"]["long"]["rms_ratio_mean"] == pytest.approx(1.5)
    assert found["summary"]["short"]["rms_ratio_mean"] == pytest.approx(1.1)
    assert found["summary"]["short"]["none_minus_decay"]["mean"] == pytest.approx(-0.015)
    assert found["summary"]["long"]["none_minus_decay"]["mean"] == pytest.approx(0.02)
    growth, crossover = weight_decay.findings(found)
    assert growth.startswith(
        "- Seen: without decay the weights grow on. After 50 steps they are 1.36 times as large as"
    )
    assert (
        "with decay 1.00 times; larger in 2 of 2 seeds. After 10 steps they are 1.10 times as large as with" in growth
    )
    assert "After 50 steps they are 1.50 times" in growth
    assert crossover.startswith("- Seen")


@pytest.mark.parametrize("losses", [(1.51, 1.23), (1.48, 1.19), (1.48, 1.2), (1.5, 1.23)])
def test_a_crossover_takes_every_seed(losses: tuple[float, float]) -> None:
    assert weight_decay.findings(weight_decays(*losses))[1].startswith("- Not seen")


def test_growth_takes_every_seed() -> None:
    said = weight_decay.findings(weight_decays(1.48, 1.23, rms=0.21))[0]
    assert said.startswith("- Not seen: without decay the weights grow on.")
    assert "larger in 1 of 2 seeds" in said


@pytest.mark.parametrize(
    ("without", "growth_is_said"), [("short, decay", True), ("long, decay", True), ("short, none", False)]
)
def test_weight_decay_of_which_an_arm_diverged(without: str, growth_is_said: bool) -> None:
    found = weight_decays(1.48, 1.23, without=without)
    text = weight_decay.tables(found)
    assert f"- {without}: training diverged with seed 2; left out." in text
    assert "no decay is better in the short run" not in text
    assert ("the weights grow on" in text) == growth_is_said
    assert text.count("| diverged |") == 1


def test_mean_rms_is_of_hidden_parameters() -> None:
    prefix = "muon/weight_rms/"
    measured = {f"{prefix}{QUERY}": [[1, 1.0], [2, 2.0]], f"{prefix}{EXPERTS}": [[1, 3.0], [2, 5.0]]}
    measured |= {f"{prefix}{EXPERTS}.0": [[1, 9.0], [2, 9.0]], f"{prefix}lm_head.weight": [[1, 9.0], [2, 9.0]]}
    assert weight_decay.mean_rms(outcome(measured)) == [(1, 2.0), (2, 3.5)]
    assert scale_rule.mean_rms(outcome(measured), scale_rule.ATTENTION_Q) == 2.0
    assert scale_rule.mean_rms(outcome(measured), scale_rule.MLP) == 5.0


def test_update_rms_of_adamw() -> None:
    prefix, other = "muon/update_rms/", "model.layers.0.self_attn.o_proj.weight"
    measured = {f"{prefix}{name}": [[1, first], [2, last]] for name, first, last in (
        (QUERY, 0.1, 0.2), (other, 0.3, 0.25), (EXPERTS, 0.2, 0.3), ("lm_head.weight", 9.0, 9.0)
    )}  # fmt: skip
    found = scale_rule.update_rms(outcome(measured))
    assert found == {"median": [(1, 0.2), (2, 0.25)], "at_the_end": {QUERY: 0.2, other: 0.25, EXPERTS: 0.3}}


def scale_rules(adamw: list[float]) -> dict:
    arms = [scale_rule.arm_of(rates, target) for rates in scale_rule.RATES for target in scale_rule.TARGETS]
    losses = {arm: {"1": 1.5, "2": 1.6} for arm in (*arms, *scale_rule.RULES.values())}
    for rates in scale_rule.RATES:
        losses[scale_rule.arm_of(rates, 0.2)] = {"1": 1.41, "2": 1.5}
        losses[scale_rule.arm_of(rates, 0.4)] = {"1": 1.39, "2": 1.49}
    losses["0.2·√H"] = {"1": 1.52, "2": 1.63}
    rms = {arm: {"1": 0.03, "2": 0.05} for arm in losses} | {"0.2·√H": {"1": 0.02, "2": 0.02}}
    medians = [[step, value] for step, value in enumerate(adamw)]
    return {
        "seeds": [1, 2],
        "diverged": {},
        **dict.fromkeys(("val_loss", "train_loss"), losses),
        **dict.fromkeys(("query_rms", "mlp_rms"), rms),
        "adamw_update_rms": {seed: {"median": medians, "at_the_end": {}} for seed in ("1", "2")},
        "targets": {rates: scale_rule.compare_targets(losses, rates) for rates in scale_rule.RATES},
        "rules": scale_rule.compare_rules(losses),
    }


def test_scale_rule() -> None:
    found = scale_rules([0.19, 0.25])
    assert found["rules"]["0.2·√H"]["mean"] == pytest.approx(0.025)
    said = scale_rule.findings(found)
    assert said[0].startswith("- Seen, at AdamW's rates: update RMS 0.2 and 0.4 are each better than 0.05, 0.1 and 0.8")
    assert "6 of the 6 comparisons" in said[0]
    assert said[1].startswith("- At Muon's rates the best mean is at 0.4. This is no test")
    assert [line.split()[1] for line in said[2:4]] == ["Seen:", "Seen:"]
    assert "at the end of training. It is 0.250 ± 0.000, and 0.250 to 0.250." in said[2]
    assert "at every measured step. It is 0.220 ± 0.035, and 0.190 to 0.250." in said[3]
    assert " 2.00 times as large" in said[4]
    assert said[5].startswith("- The queries' weights end 2.00 times")
    assert said[6].startswith("- Seen: one factor for all shapes is worse, in every seed.")
    assert "+0.0250 ± 0.0050" in said[6]
    assert said[7].startswith("- With 0.2/RMS(O) the loss differs by +0.0000")
    assert "above in 0 of 2 seeds" in said[7]


@pytest.mark.parametrize("rates", ["adamw", "muon"])
def test_each_claimed_rms_must_be_better_than_each_other_in_every_seed(rates: str) -> None:
    found = scale_rules([0.2])
    losses = {**found["val_loss"], scale_rule.arm_of(rates, 0.1): {"1": 1.9, "2": 1.5}}  # as good as 0.2 in one seed
    found["val_loss"], found["targets"] = (
        losses,
        {one: scale_rule.compare_targets(losses, one) for one in ("adamw", "muon")},
    )
    said = scale_rule.findings(found)[0]
    assert said.startswith("- Not seen, at AdamW's" if rates == "adamw" else "- Seen, at AdamW's")
    assert f"{5 if rates == 'adamw' else 6} of the 6" in said


def test_equal_losses_are_not_worse() -> None:
    found = scale_rules([0.2])
    found["val_loss"]["0.2·√H"] = dict(found["val_loss"]["0.2·√max"])
    found["rules"] = scale_rule.compare_rules(found["val_loss"])
    assert scale_rule.findings(found)[6].startswith("- Not seen: one factor for all shapes is worse")


def test_update_rms_that_is_not_seen() -> None:
    said = scale_rule.findings(scale_rules([0.17, 0.25]))
    assert [line.startswith("- Not seen") for line in said[2:4]] == [False, True]
    assert scale_rule.findings(scale_rules([0.2, 0.31]))[2].startswith("- Not seen")


def test_arms_that_diverged_are_said_and_left_out() -> None:
    found = scale_rules([0.2])
    gone = scale_rule.arm_of("adamw", 0.8)
    for key in ("val_loss", "train_loss", "query_rms", "mlp_rms"):
        found[key] = {arm: value for arm, value in found[key].items() if arm != gone}
    found["diverged"] = {gone: [2]}
    found["targets"] = {one: scale_rule.compare_targets(found["val_loss"], one) for one in ("adamw", "muon")}
    text = scale_rule.tables(found)
    assert "| diverged |" in text
    assert "- AdamW's rates, 0.8: training diverged with seed 2; left out." in text
    assert "- Not seen, at AdamW's rates" in text
    assert "4 of the 6 comparisons" in text


def attention(muon: float, clipped_loss: float, share: float = 0.5) -> dict:
    names = ["AdamW", "Muon", attention_logits.ADAMW_HIGH, attention_logits.MUON_HIGH]
    clipped = [attention_logits.clipped_arm(tau) for tau in attention_logits.TAUS]
    losses = {arm: {1: 1.5, 2: 1.6} for arm in (*names, *clipped)}
    losses[clipped[0]] = {1: clipped_loss, 2: clipped_loss + 0.1}
    logits = {arm: {1: [(1, 5.0), (2, 3.0)], 2: [(1, 4.0), (2, 6.0)]} for arm in losses}
    logits[attention_logits.MUON_HIGH] = {1: [(1, muon)], 2: [(1, 20.0)]}
    found = {
        "seeds": [1, 2],
        "diverged": {},
        "val_loss": losses,
        "largest_logit": logits,
        "heads_at_the_end": {arm: {1: {"a.0": 1.0}, 2: {"a.0": 2.0}} for arm in losses},
        "share_of_heads_clipped": {clipped[0]: {1: share, 2: share}, clipped[1]: {1: 0.0, 2: 0.0}},
        "summary": attention_logits.summarize(losses, logits),
    }
    return json.loads(json.dumps(found))


def test_attention_logits() -> None:
    found = attention(muon=9.0, clipped_loss=1.51)
    assert found["summary"]["largest"]["AdamW"] == {"1": 5.0, "2": 6.0}
    assert found["summary"]["muon_minus_adamw"]["high rates"]["mean"] == pytest.approx(9.0)
    assert found["summary"]["seed_sd_of_the_loss"] == pytest.approx(0.1 / 2**0.5)
    tuned, high, bites, usual = attention_logits.findings(found)
    assert tuned.startswith("- Not seen, at tuned rates")
    assert high.startswith("- Seen, at high rates")
    assert bites.startswith("- Seen: clipping with τ = 10")
    assert "+0.0100" in bites
    assert bites.endswith("is 0.0707; by the paired differences, p = – for a cost above zero.")  # no spread at all
    assert usual == "- τ = 100 never clipped anything."
    text = attention_logits.tables(found)
    assert "| Muon, high rate, τ = 10 | 1.560 ± 0.071 | 5.5 ± 0.7 | 4.5 ± 2.1 | 1.5 ± 0.7 | 50 % |" in text
    assert "| τ = 10 | +0.0100 | 0.0000 | 0 of 2 |" in text


def test_attention_logits_that_are_not_seen() -> None:
    _, high, bites, _ = attention_logits.findings(attention(muon=4.0, clipped_loss=1.7))
    assert high.startswith("- Not seen, at high rates")
    assert "in 1 of 2 seeds" in high
    assert bites.startswith("- Not seen: clipping with τ = 10")


def test_p_of_a_cost_is_of_its_being_above_zero() -> None:
    found = attention(muon=9.0, clipped_loss=1.51)
    found["summary"]["cost_of_clipping"]["10"]["p_below"] = 0.9
    assert attention_logits.findings(found)[2].endswith("p = 0.100 for a cost above zero.")


def test_share_of_heads_clipped() -> None:
    measured = {f"attention/clipped_heads/layers.{n}": [[1, 0.0], [2, float(n)]] for n in (0, 1, 2)}
    assert attention_logits.share_clipped(outcome(measured), heads=6) == pytest.approx((0 + 3) / 2 / 6)


def test_heads() -> None:
    measured = {f"attention/max_logit/{name}": [[1, 1.0], [2, 2.0]] for name in ("a.b", "a.b.0", "a.b.1", "_max")}
    assert attention_logits.of_heads(outcome(measured)) == {"a.b.0": 2.0, "a.b.1": 2.0}


def law(depth: str, plain: float, corrected: float, is_curved: bool = False, name: str = "q") -> dict:
    kinds = {"plain": plain, "width_corrected": corrected}
    each = {kind: {"exponent": {"value": value}, "is_curved": is_curved} for kind, value in kinds.items()}
    return {"type": f"model.layers.*.{name}.weight", "depth": depth, **each}


def test_momentum_spectra() -> None:
    laws = [law("mid-early", 0.3, 0.1), law("mid", 0.2, -0.1), law("mid-late", 0.3, 0.1)]
    laws += [law("mid-late", 0.4, 0.2, name="k"), law("mid", 0.6, 0.1, name="k"), law("–", 9.0, 9.0)]
    laws += [law("final", 0.5, 0.3, is_curved=True), law("final", 0.7, 0.3, is_curved=True, name="k")]
    said = momentum_spectra.findings({"laws": laws})
    assert [line.split(":")[0] for line in said] == ["- Seen"] * 3
    assert "4 of 5 laws (mid-early 1 of 1; mid 2 of 2; mid-late 1 of 2)" in said[0]
    assert "2 of 2: `q` and `k`" in said[1]
    assert (
        "Of all 7 laws 2 are curved, where straight ones would give 0.4 by chance (5 % each): mid-early 0 of 1"
        in said[2]
    )
    assert "| `k` | 0.60 | 0.40 | 0.70 |" in momentum_spectra.tables({"laws": laws})


def test_momentum_spectra_that_are_not_seen() -> None:
    laws = [law("mid-early", 0.3, 0.5), law("mid", 0.2, -0.1), law("mid-late", 0.3, 0.5)]
    laws += [law("mid", 0.6, 0.5, name="k"), law("mid-late", 0.3, 0.1, name="k")]
    laws += [law("final", 0.5, 0.3, is_curved=True, name="k"), law("final", 0.4, 0.3)]
    laws += [law("final", 0.4, 0.3, name=f"other{n}") for n in range(9)]  # one of eleven is curved: a chance of 43 %
    said = momentum_spectra.findings({"laws": laws})
    assert [line.split(":")[0] for line in said] == ["- Not seen"] * 3
    assert "1 of 2: `q`." in said[1]  # steeper than one of the middle's is not enough
