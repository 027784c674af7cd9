"""The measures of a mixture of experts, against loops over tokens."""

import math

import pytest
import torch

from lightning_muon.experts import measures
from lightning_muon.experts.counting import Counted, add_routing, count_routing, new_sums
from lightning_muon.experts.starved import StarvedExperts


def entropy(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0) / math.log(len(probabilities))


@pytest.mark.parametrize("tokens", [[3, 0, 9, 4], [5, 5, 5], [0, 0, 7], [1, 2, 3, 4, 5, 6, 0, 0]])
def test_measures_of_loads(tokens):
    mean = sum(tokens) / len(tokens)
    counts = torch.tensor(tokens)
    assert measures.load_fractions(counts).tolist() == pytest.approx([n / sum(tokens) for n in tokens])
    assert measures.max_vio(counts) == pytest.approx((max(tokens) - mean) / mean)
    assert measures.min_load(counts) == pytest.approx(min(tokens) / mean)
    assert measures.dead_experts(counts) == pytest.approx(tokens.count(0) / len(tokens))
    assert measures.load_entropy(counts) == pytest.approx(entropy([n / sum(tokens) for n in tokens]))


def test_the_ends_of_the_ranges():
    even, one_sided = torch.tensor([4, 4, 4, 4]), torch.tensor([16, 0, 0, 0])
    assert (measures.max_vio(even), measures.min_load(even), measures.load_entropy(even)) == (0, 1, 1)
    assert (measures.max_vio(one_sided), measures.min_load(one_sided), measures.load_entropy(one_sided)) == (3, 0, 0)
    assert measures.load_entropy(torch.tensor([3])) == 1
    assert measures.router_entropy(measures.probabilities(torch.ones(2, 5))).tolist() == pytest.approx([1, 1])
    assert measures.router_entropy(torch.eye(3)).tolist() == [0, 0, 0]


def routing(scoring="softmax", scale=2.5, seed=0):
    """Logits, weights and choices of 50 tokens, as a router computes them, and each token's probabilities as lists."""
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(seed)) * 2
    scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "identity": logits.exp()}[scoring]
    experts = scores.topk(3).indices
    weights = scores.gather(1, experts)
    probabilities = [[one / sum(row) for one in row] for row in scores.tolist()]
    returned = scores if scoring == "identity" else logits
    return returned, weights / weights.sum(-1, keepdim=True) * scale, experts, probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "identity"])
def test_scores_are_told_from_logits_by_the_weights(scoring, dtype):
    returned, weights, experts, probabilities = routing(scoring)
    sums = new_sums(7, torch.device("cpu"))
    for part in (slice(0, 20), slice(20, 50)):
        count_routing(sums, experts[part], returned[part], weights[part].to(dtype), 7)
    counted = Counted.of(sums)
    assert counted.tokens.tolist() == [sum(row.count(e) for row in experts.tolist()) for e in range(7)]
    chosen = [sum(row[e] for e in picks) for row, picks in zip(probabilities, experts.tolist(), strict=True)]
    assert counted.router_entropy == pytest.approx(sum(map(entropy, probabilities)) / 50, rel=1e-5)
    assert counted.routing_confidence == pytest.approx(sum(chosen) / 50, rel=1e-5)


def test_scores_that_the_weights_do_not_follow_from_are_not_measured():
    logits, weights, experts, _ = routing()
    sums = new_sums(7, torch.device("cpu"))
    count_routing(sums, experts, logits, weights.flip(-1), 7)
    counted = Counted.of(sums)
    assert counted.tokens.sum() == 150
    assert (counted.router_entropy, counted.routing_confidence) == (None, None)


def test_a_token_without_experts_does_not_hide_how_scores_are_made():
    logits, weights, experts, probabilities = routing("sigmoid")
    experts[7], weights[7] = -1, 0
    sums = new_sums(7, torch.device("cpu"))
    count_routing(sums, experts, logits, weights, 7)
    assert Counted.of(sums).router_entropy == pytest.approx(sum(map(entropy, probabilities)) / 50, rel=1e-5)


def test_numbers_of_no_expert_are_left_out():
    sums = new_sums(3, torch.device("cpu"))
    scores = torch.tensor([[1.0, 2.0, 1.0]] * 2)
    count_routing(sums, torch.tensor([[0, -1], [2, 3]], dtype=torch.int32), scores, None, 3)
    counted = Counted.of(sums)
    assert counted.tokens.tolist() == [1, 0, 1]
    assert counted.routing_confidence == pytest.approx(0.25)


@pytest.mark.parametrize("with_weights", [True, False])
def test_counting_never_waits_for_the_device(with_weights):
    """On the meta device there are no values: whatever asks for one raises."""
    logits, weights, experts, _ = (one.to("meta") if isinstance(one, torch.Tensor) else one for one in routing())
    add_routing(new_sums(7, torch.device("meta")), experts, logits, weights if with_weights else None, 7)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.bincount(experts.flatten(), minlength=7)  # what asks


def loads(*dead, num_experts=4):
    return {"layer": torch.tensor([0 if expert in dead else 5 for expert in range(num_experts)])}


def test_an_expert_is_starved_after_twenty_measurements_and_500_steps():
    often, seldom = StarvedExperts(), StarvedExperts()
    assert not any(often.look(step, loads(2)) for step in range(1, 501))
    (finding,) = often.look(501, loads(2))
    assert (finding.kind, finding.name) == ("dead_experts", "layer.2")
    assert "since step 1, in 501 measurements" in finding.trouble
    assert not any(seldom.look(100 * number, loads(1, 3)) for number in range(1, 20))
    assert [finding.name for finding in seldom.look(2000, loads(1, 3))] == ["layer.1", "layer.3"]


def test_one_token_ends_it():
    starved = StarvedExperts()
    for number in range(1, 30):
        starved.look(50 * number, loads(0, 1))
    findings = {finding.name: finding.trouble for finding in starved.look(1500, loads(1))}
    assert findings["layer.0"] is None
    assert "since step 50" in findings["layer.1"]
    assert starved.look(1550, {}) == []  # a layer that no token has passed says nothing
    assert all(f.trouble is None for f in starved.look(1600, loads()))
    for number in range(33, 60):
        findings = {finding.name: finding.trouble for finding in starved.look(50 * number, loads(0))}
        assert (findings["layer.0"] is not None) == (number >= 52)  # the twentieth after the last token
