"""A planted head is brought to τ, the others stay as they are; what cannot be seen is said."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import lightning_muon as lm
from lightning_muon.sharding.fsdp.recompute import checkpoint_activations
from tests.attention_models import (
    HEADS,
    WithBias,
    build,
    describe,
    inputs,
    logits_of,
    plant,
    query_rows,
    slow_max_logits,
)

KINDS = ("mha", "gqa", "mqa", "mla", "bias", "fused")


def standing_still(model):
    """An optimizer whose steps change nothing."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def step(model, optimizer, clipper, *batches):
    for x in batches:
        model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    clipper.clip(optimizer)


def weights(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def changed_rows(before, model):
    """The rows that are not bitwise what they were."""
    after = weights(model)
    return {
        name: [row for row, (a, b) in enumerate(zip(old, after[name], strict=True)) if not torch.equal(a, b)]
        for name, old in before.items()
        if not torch.equal(old, after[name])
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_head_comes_to_tau_and_no_other_moves(kind):
    model, x = build(kind), inputs()
    plant(model, kind, x)
    others = [s for head, s in enumerate(logits_of(model, x)) if head != 2]
    assert max(others) < 100
    clipper, before = lm.QKClipper(model, tau=100.0, heads=describe), weights(model)
    step(model, standing_still(model), clipper, x)
    (found,) = clipper.maxima.values()
    assert found[2] == pytest.approx(300, rel=1e-5)
    after = logits_of(model, x)
    assert 100 * (1 - 1e-3) <= after[2] <= 100 * (1 + 1e-3)
    assert [s for head, s in enumerate(after) if head != 2] == others
    _, rows = query_rows(kind, 2)
    queries = list(range(rows.start, rows.stop))
    expected = {
        "mha": {"self_attn.q_proj.weight": queries, "self_attn.k_proj.weight": queries},
        "gqa": {"self_attn.q_proj.weight": queries},
        "mqa": {"self_attn.q_proj.weight": queries},
        "mla": {"self_attn.q_proj.weight": queries, "self_attn.kv_b_proj.weight": [16, 17, 18, 19, 20]},
        "bias": {f"{side}_proj.{part}": queries for side in "qk" for part in ("weight", "bias")},
        "fused": {f"qkv.{part}": queries + [row + 24 for row in queries] for part in ("weight", "bias")},
    }
    assert changed_rows(before, model) == expected[kind]
    if kind == "mla":
        ratio = model.self_attn.q_proj.weight.detach() / before["self_attn.q_proj.weight"]
        torch.testing.assert_close(ratio[18:23], torch.full((5, 20), 3**-0.5), rtol=1e-5, atol=0)
        torch.testing.assert_close(ratio[23:27], torch.full((4, 20), 1 / 3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_seen_is_the_reference(kind):
    model, x = build(kind), inputs()
    clipper = lm.QKClipper(model, tau=math.inf, heads=describe)
    step(model, standing_still(model), clipper, x)
    (found,) = clipper.maxima.values()
    assert found == pytest.approx(logits_of(model, x), rel=1e-5)


def test_several_heads_at_once():
    model, x = build("mha"), inputs()
    for head, largest in enumerate((150.0, 99.0, 300.0, 101.0)):
        plant(model, "mha", x, head, largest)
    clipper = lm.QKClipper(model)
    before = logits_of(model, x)
    step(model, standing_still(model), clipper, x)
    assert logits_of(model, x) == pytest.approx([100, 99, 100, 100], rel=1e-4)
    assert logits_of(model, x)[1] == before[1]
    assert clipper.figures()["attention/clipped_heads/self_attn"] == 3


def tiny_transformers(kind, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = {"vocab_size": 19, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "use_cache": False}
    common |= {"num_attention_heads": 4, "attn_implementation": "sdpa", "initializer_range": 0.3, **options}
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, num_key_value_heads=2))
    sizes = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "kv_lora_rank": 10, "q_lora_rank": 12}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 1}
    config = transformers.DeepseekV3Config(
        **common, **sizes, **experts, num_key_value_heads=4, topk_group=1, first_k_dense_replace=1
    )
    return transformers.DeepseekV3ForCausalLM(config)


def first_layer_maxima(model, ids):
    """S of each head of the first layer, in float64, from what reaches torch's attention."""
    calls, original = [], F.scaled_dot_product_attention

    def recorded(query, key, value, **kwargs):
        calls.append((query, key, kwargs["scale"]))
        return original(query, key, value, **kwargs)

    model.eval()
    F.scaled_dot_product_attention = recorded
    try:
        with torch.no_grad():
            model(input_ids=ids)
    finally:
        F.scaled_dot_product_attention = original
        model.train()
    query, key, scale = calls[0]
    return slow_max_logits(query, key, lambda _b, _h, i, j: j <= i, scale)


@pytest.mark.parametrize("kind", ["llama", "deepseek"])
def test_models_of_transformers(kind):
    model, ids = tiny_transformers(kind), torch.arange(24).reshape(2, 12) % 19
    name = "model.layers.0.self_attn"
    start = first_layer_maxima(model, ids)
    tau = sorted(start)[2] * 1.0001  # the largest of four heads is above
    worst = start.index(max(start))
    clipper, optimizer = lm.QKClipper(model, tau=tau, include=r"layers\.0\."), standing_still(model)
    before = weights(model)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    clipper.clip(optimizer)
    assert clipper.maxima == {name: pytest.approx(start, rel=1e-5)}
    after = first_layer_maxima(model, ids)
    assert after[worst] == pytest.approx(tau, rel=1e-3)
    assert [s for head, s in enumerate(after) if head != worst] == [s for head, s in enumerate(start) if head != worst]
    queries, width = ("q_proj", 8) if kind == "llama" else ("q_b_proj", 12)
    changed = changed_rows(before, model)
    assert changed.pop(f"{name}.{queries}.weight") == list(range(worst * width, (worst + 1) * width))
    if kind == "deepseek":
        assert changed.pop(f"{name}.kv_b_proj.weight") == list(range(worst * 14, worst * 14 + 8))
    assert not changed  # no shared key


def test_padding_is_not_seen():
    model, ids = tiny_transformers("llama"), torch.arange(24).reshape(2, 12) % 19
    clipper = lm.QKClipper(model, log_only=True, include=r"layers\.0\.")
    optimizer = standing_still(model)
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    model(input_ids=ids, attention_mask=mask).logits.mean().backward()
    clipper.clip(optimizer)
    # queries at padded positions attend to what is not padded
    (padded,) = clipper.maxima.values()
    model(input_ids=ids[:, :4]).logits.mean().backward()
    clipper.clip(optimizer)
    (short,) = clipper.maxima.values()
    whole = first_layer_maxima(model, ids)
    assert all(a <= b * (1 + 1e-5) <= c * (1 + 2e-5) for a, b, c in zip(short, padded, whole, strict=True))
    assert padded != pytest.approx(whole, rel=1e-3)


def test_micro_batches_count_together():
    model = build("mha")
    clipper, optimizer = lm.QKClipper(model, tau=math.inf), standing_still(model)
    batches = [inputs(seed) for seed in (1, 2, 3)]
    step(model, optimizer, clipper, *batches)
    (found,) = clipper.maxima.values()
    each = [logits_of(model, x) for x in batches]
    assert found == pytest.approx([max(heads) for heads in zip(*each, strict=True)], rel=1e-5)
    step(model, optimizer, clipper, batches[0])
    (found,) = clipper.maxima.values()
    assert found == pytest.approx(each[0], rel=1e-5), "the clip begins anew"


def test_evaluation_is_not_counted():
    model = build("mha")
    clipper, optimizer = lm.QKClipper(model), standing_still(model)
    step(model, optimizer, clipper, inputs())
    (expected,) = clipper.maxima.values()
    model.eval()
    model(inputs() * 100)
    model.train()
    step(model, optimizer, clipper, inputs())
    assert list(clipper.maxima.values()) == [expected]


def test_log_only_changes_nothing():
    model, x = build("mha"), inputs()
    plant(model, "mha", x)
    before = weights(model)
    clipper = lm.QKClipper(model, log_only=True)
    step(model, standing_still(model), clipper, x)
    assert clipper.maxima["self_attn"][2] == pytest.approx(300, rel=1e-5)
    assert not changed_rows(before, model)
    assert not any("clipped" in key for key in clipper.figures())


def test_a_head_at_tau_stays():
    model, x = build("mha"), inputs()
    clipper = lm.QKClipper(model, log_only=True)
    step(model, standing_still(model), clipper, x)
    exactly = max(clipper.maxima["self_attn"])
    clipper.close()
    clipper, before = lm.QKClipper(model, tau=exactly), weights(model)
    step(model, standing_still(model), clipper, x)
    assert not changed_rows(before, model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_left_alone_and_said(value):
    model, x = build("mha"), inputs()
    clipper, optimizer = lm.QKClipper(model, tau=1e-3), standing_still(model)
    x[0, 0, 0] = value
    before = weights(model)
    model(x).nansum().backward()
    clipper.clip(optimizer)
    assert not changed_rows(before, model)
    assert clipper.maxima["self_attn"] == [math.inf] * HEADS
    (finding,) = clipper.findings()
    assert "logit of head 0 is not finite" in finding.trouble


# ---------------------------------------------------------------- 16 bits, and who else trains


def test_master_weights_are_scaled_exactly():
    model, x = build("mha").bfloat16(), inputs().bfloat16()
    plant(model, "mha", x)
    optimizer = lm.Muon(model, lr=1e-4, master_weights=True)
    clipper = lm.QKClipper(model)
    model(x).square().mean().backward()
    optimizer.step()
    masters = {param: state["master_weight"].clone() for param, state in optimizer.state.items()}
    before = weights(model)
    clipper.clip(optimizer)
    assert set(changed_rows(before, model)) == {"self_attn.q_proj.weight", "self_attn.k_proj.weight"}
    factor = torch.tensor((100 / clipper.maxima["self_attn"][2]) ** 0.5)
    for param, state in optimizer.state.items():
        expected = masters[param]
        if any(param is side.weight for side in (model.self_attn.q_proj, model.self_attn.k_proj)):
            expected[12:18] *= factor
        assert torch.equal(state["master_weight"], expected)
        assert torch.equal(param.detach(), expected.bfloat16())


def test_master_weights_of_a_weight_that_was_set_since():
    model, x = build("mha").bfloat16(), inputs().bfloat16()
    plant(model, "mha", x)
    optimizer = lm.Muon(model, lr=1e-4, master_weights=True)
    clipper = lm.QKClipper(model)
    model(x).square().mean().backward()
    optimizer.step()
    param = model.self_attn.q_proj.weight
    with torch.no_grad():
        param[0] = 7.0
    clipper.clip(optimizer)
    assert (param[0] == 7).all()
    assert (optimizer.state[param]["master_weight"][0] == 7).all()


def test_bfloat16_without_master_weights():
    model, x = build("mla").bfloat16(), inputs().bfloat16()
    plant(model, "mla", x)
    clipper = lm.QKClipper(model)
    step(model, torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0), clipper, x)
    assert logits_of(model, x)[2] == pytest.approx(100, rel=0.02)  # of 16-bit numbers


def test_float64_and_a_weight_in_another_memory_order():
    model, x = build("mha").double(), inputs().double()
    weight = model.self_attn.q_proj.weight
    weight.data = weight.data.T.contiguous().T
    plant(model, "mha", x)
    clipper = lm.QKClipper(model)
    step(model, standing_still(model), clipper, x)
    assert logits_of(model, x)[2] == pytest.approx(100, rel=1e-6)
    assert not weight.is_contiguous()


def test_two_optimizers_clip_what_each_trains():
    model = nn.ModuleDict({"first": build("mha", 0), "second": build("mha", 1)})
    x = inputs()
    optimizers = [standing_still(model[name]) for name in model]
    for name in model:
        plant(model[name], "mha", x)
    clipper = lm.QKClipper(model)
    for name in model:
        model[name](x).mean().backward()
    clipper.clip(optimizers[0])
    assert [logits_of(model[name], x)[2] for name in model] == pytest.approx([100, 300], rel=1e-4)
    clipper.clip(optimizers[1])
    assert [logits_of(model[name], x)[2] for name in model] == pytest.approx([100, 100], rel=1e-4)
    assert clipper.untrained(optimizers) == []
    assert clipper.untrained(optimizers[:1]) == ["second.self_attn"]
    with pytest.raises(ValueError, match=r"train none of first\.self_attn, second\.self_attn"):
        clipper.clip(standing_still(nn.Linear(2, 2)))


# ---------------------------------------------------------------- how attention is computed


def another_kernel(query, key, value):
    weights = torch.softmax(query @ key.mT / math.sqrt(query.shape[-1]), -1)
    return weights @ value


def test_another_kernel_is_an_error_until_it_tells():
    model = WithBias(another_kernel)
    clipper = lm.QKClipper(nn.ModuleDict({"attn": model}))
    model(inputs()).mean().backward()
    with pytest.raises(RuntimeError, match=r"attn: attention has run and its logits were not seen.*observe_attention"):
        clipper.clip(standing_still(model))
    clipper.close()

    def telling(query, key, value):
        lm.observe_attention(model, query, key)
        return another_kernel(query, key, value)

    model.kernel = telling
    clipper = lm.QKClipper(model, tau=math.inf)
    step(model, standing_still(model), clipper, inputs())
    (found,) = clipper.maxima.values()
    expected = WithBias()
    expected.load_state_dict(model.state_dict())
    assert found == pytest.approx(logits_of(expected, inputs()), rel=1e-5)
    clipper.close()
    model(inputs())  # nobody watches, and nothing happens


def test_a_kernel_tells_from_compiled_code():
    torch.compiler.reset()
    model = WithBias()

    def telling(query, key, value):
        lm.observe_attention(model, query, key)
        return another_kernel(query, key, value)

    expected = logits_of(model, inputs())
    model.kernel = telling
    clipper = lm.QKClipper(model, tau=math.inf)
    model.compile(backend="eager")
    step(model, standing_still(model), clipper, inputs())
    assert list(clipper.maxima.values()) == [pytest.approx(expected, rel=1e-5)]


def test_a_batch_of_padding_alone_is_no_error():
    model = nn.ModuleDict({"attn": WithBias()})
    hidden = torch.zeros(9, 9, dtype=torch.bool)
    model["attn"].kernel = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=hidden)
    clipper = lm.QKClipper(model)
    model["attn"](inputs())
    clipper.clip(standing_still(model))
    assert clipper.maxima == {"attn": [-math.inf] * HEADS}
    assert not any("max_logit" in key for key in clipper.figures())
    assert not clipper.findings()


def test_eager_attention_of_transformers_is_an_error():
    model = tiny_transformers("llama", attn_implementation="eager")
    clipper, optimizer = lm.QKClipper(model), standing_still(model)
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.mean().backward()
    with pytest.raises(RuntimeError, match='attn_implementation="sdpa"'):
        clipper.clip(optimizer)


def test_other_heads_than_described_are_an_error():
    model = build("fused")
    lm.QKClipper(model, heads={"": lm.AttentionHeads.grouped_query(2, 12, query="qkv", key="qkv", key_start=24)})
    with pytest.raises(ValueError, match=r"queries of shape \(3, 4, 9, 6\).*2 heads"):
        model(inputs())
    assert torch._C._len_torch_function_stack() == 0


def test_nothing_ran():
    model = build("mha")
    clipper = lm.QKClipper(model)
    with pytest.raises(RuntimeError, match="No attention module has run in training"):
        clipper.clip(standing_still(model))


def test_a_module_that_never_runs_is_mentioned_once():
    model = nn.ModuleDict({"runs": build("mha"), "rests": build("mha")})
    clipper, optimizer = lm.QKClipper(model), standing_still(model)
    said = []
    for _ in range(25):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(model["runs"], optimizer, clipper, inputs())
        said += [str(one.message) for one in caught if "QKClip watches" in str(one.message)]
    assert len(said) == 1
    assert "rests.self_attn, which did not run" in said[0]
    assert set(clipper.figures()) >= {"attention/max_logit/runs.self_attn"}


@pytest.mark.parametrize("part", ["attention", "model"])
def test_compiled(part):
    torch.compiler.reset()
    model, x = build("mha"), inputs()
    plant(model, "mha", x)
    clipper = lm.QKClipper(model)
    if part == "attention":
        model.self_attn.compile(backend="eager")
    else:
        model.compile(backend="eager")
    step(model, standing_still(model), clipper, x)
    assert clipper.maxima["self_attn"][2] == pytest.approx(300, rel=1e-5)
    step(model, standing_still(model), clipper, x)
    assert clipper.maxima["self_attn"][2] == pytest.approx(100, rel=1e-5)
    assert torch._C._len_torch_function_stack() == 0


def test_compiled_before_it_was_watched_is_an_error():
    torch.compiler.reset()
    model = build("mha")
    compiled = torch.compile(model, backend="eager")
    compiled(inputs()).mean().backward()
    clipper = lm.QKClipper(compiled)
    compiled(inputs()).mean().backward()
    with pytest.raises(RuntimeError, match=r"torch\.compiler\.reset"):
        clipper.clip(standing_still(model))


@pytest.mark.parametrize("how", ["ours", "around", "reentrant"])
def test_activation_checkpointing_is_seen_once(how, monkeypatch):
    model, x = build("mha"), inputs().requires_grad_()
    plain = copy.deepcopy(model)
    calls = []
    from lightning_muon.attention import observe

    original = observe.max_logits
    monkeypatch.setattr(observe, "max_logits", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    clipper = lm.QKClipper(model, tau=math.inf)
    if how == "ours":
        checkpoint_activations([model.self_attn])
        model(x).square().mean().backward()
    else:
        checkpoint(model, x, use_reentrant=how == "reentrant").square().mean().backward()
    clipper.clip(standing_still(model))
    assert len(calls) == 1
    assert clipper.maxima["self_attn"] == pytest.approx(logits_of(plain, x), rel=1e-5)
    plain(x).square().mean().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_training_is_bitwise_the_same_under_observation():
    results = []
    for watched in (False, True):
        model = build("mla")
        optimizer = lm.Muon(model, lr=1e-2)
        clipper = lm.QKClipper(model, tau=math.inf) if watched else None
        for seed in range(5):
            with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                loss = model(inputs(seed)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if clipper is not None:
                clipper.clip(optimizer)
        results.append(weights(model))
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_a_forward_that_fails_leaves_nothing_behind():
    model = build("mha")
    clipper = lm.QKClipper(model)
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 9, 3))
    assert torch._C._len_torch_function_stack() == 0
    step(model, standing_still(model), clipper, inputs())


def test_close_leaves_the_model_as_it_was():
    model = build("mha")
    clipper = lm.QKClipper(model)
    copied = copy.deepcopy(model)
    copied(inputs())
    clipper.close()
    clipper.close()
    assert not model.self_attn._forward_hooks
    assert not model.self_attn._forward_pre_hooks
    lm.observe_attention(model.self_attn, torch.zeros(1), torch.zeros(1))


def test_switched_off_it_sees_nothing_and_begins_anew():
    model = build("mha")
    clipper, optimizer = lm.QKClipper(model, log_only=True), standing_still(model)
    model(inputs() * 9)
    clipper.watch(False)
    model(inputs() * 9)
    clipper.watch(True)
    step(model, optimizer, clipper, inputs())
    assert clipper.maxima["self_attn"] == pytest.approx(logits_of(model, inputs()), rel=1e-5)


# ---------------------------------------------------------------- figures and alarms


def test_figures():
    model = nn.ModuleDict({"first": build("mha", 0), "second": build("gqa", 1)})
    clipper = lm.QKClipper(model, tau=math.inf)
    model["first"](inputs())
    model["second"](inputs())
    clipper.reduce()
    brief = clipper.figures()
    expected = {name: max(logits_of(model[name], inputs())) for name in model}
    assert brief == pytest.approx(
        {
            **{f"attention/max_logit/{name}.self_attn": s for name, s in expected.items()},
            "attention/max_logit/_max": max(expected.values()),
            "attention/max_logit/_mean": sum(expected.values()) / 2,
            "attention/max_logit/_min": min(expected.values()),
            **{f"attention/clipped_heads/{name}.self_attn": 0.0 for name in model},
        },
        rel=1e-5,
    )
    clipper.reduce()
    detailed = clipper.figures("detailed")
    heads = logits_of(model["second"], inputs())
    assert [detailed[f"attention/max_logit/second.self_attn.{head}"] for head in range(4)] == pytest.approx(heads)
    with pytest.raises(ValueError, match="mode='all' is not known"):
        clipper.figures("all")


def test_figures_of_what_has_run_since():
    model = nn.ModuleDict({"first": build("mha", 0), "second": build("mha", 1)})
    clipper, optimizer = lm.QKClipper(model, tau=1e-3), standing_still(model)
    step(model["first"], optimizer, clipper, inputs())
    step(model["second"], optimizer, clipper, inputs())
    figures = clipper.figures()
    assert {key for key in figures if "max_logit" in key and "_m" not in key.rpartition("/")[2]} == {
        "attention/max_logit/first.self_attn",
        "attention/max_logit/second.self_attn",
    }
    assert figures["attention/clipped_heads/first.self_attn"] == 4
    step(model["second"], optimizer, clipper, inputs())
    assert "attention/max_logit/first.self_attn" not in clipper.figures()


@pytest.mark.parametrize(("log_only", "threshold"), [(True, 100), (False, 200)])
def test_thresholds_of_the_alarm(log_only, threshold):
    for largest, is_trouble in ((threshold * 0.999, False), (threshold * 1.001, True)):
        model, x = build("mha"), inputs()
        plant(model, "mha", x, largest=largest)
        clipper = lm.QKClipper(model, log_only=log_only)
        step(model, standing_still(model), clipper, x)
        (finding,) = clipper.findings()
        assert (finding.kind, finding.name) == ("attention_logits", "self_attn")
        assert (finding.trouble is not None) == is_trouble
        if is_trouble:
            assert f"logit of head 2 is {largest:.4g}" in finding.trouble
            assert "(3 of its" not in finding.trouble


def test_several_heads_in_trouble_are_one_alarm():
    model, x = build("mha"), inputs()
    for head in range(3):
        plant(model, "mha", x, head, 300.0 + head)
    clipper = lm.QKClipper(model)
    step(model, standing_still(model), clipper, x)
    (finding,) = clipper.findings()
    assert "logit of head 2 is 302, more than twice τ = 100 (3 of its 4 heads are above 200)" in finding.trouble


def test_tau_must_be_positive():
    for tau in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="must be positive"):
            lm.QKClipper(build("mha"), tau=tau)
