"""Loads counted in models of others and of our own, against what their routers returned, counted one by one."""

import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lightning_muon as lm
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM

E, K = 6, 2
SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "use_cache": False}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": K}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
FAMILIES = ("max_vio", "min_load", "load_entropy", "dead_experts", "router_entropy", "routing_confidence")


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=E))


def qwen():
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, num_experts=E, moe_intermediate_size=8, head_dim=8))


def deepseek():
    options = {"n_routed_experts": E, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL, **LATENT, **options, first_k_dense_replace=1))


def moe_lm():
    return MoELM(ModelConfig(hidden_size=16, num_hidden_layers=3, n_routed_experts=E, num_experts_per_tok=K))


def build(kind):
    torch.manual_seed(0)
    model = kind().train()
    for name, param in model.named_parameters():
        if name.endswith("gate.weight"):
            nn.init.normal_(param, std=0.5)  # a router that prefers some
    return model


def token_ids(number=1):
    return torch.randint(0, 64, (number, 10), generator=torch.Generator().manual_seed(number))


def loss_of(model, tokens):
    output = model(tokens)
    return getattr(output, "logits", output).square().mean()


class Witness:
    """Keeps what each router returned: choices, and scores by the function that the model's paper has."""

    def __init__(self, model, scoring):
        self.tokens, self.probabilities, self.chosen = {}, {}, {}
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(lambda _, __, output, layer=name[:-5]: self.see(layer, scoring, *output))

    def see(self, layer, scoring, first, _, third):
        experts, scores = (first, third) if scoring is None else (third, scoring(first.double()))
        for picks, row in zip(experts.tolist(), scores.tolist(), strict=True):
            self.tokens.setdefault(layer, Counter()).update(picks)
            p = [one / sum(row) for one in row]
            self.probabilities.setdefault(layer, []).append(p)
            self.chosen.setdefault(layer, []).append(sum(p[expert] for expert in picks))

    def values(self):
        found = {}
        for layer, counter in self.tokens.items():
            loads = [counter[expert] for expert in range(E)]
            total, mean = sum(loads), sum(loads) / E
            found[f"moe/max_vio/{layer}"] = (max(loads) - mean) / mean
            found[f"moe/min_load/{layer}"] = min(loads) / mean
            found[f"moe/dead_experts/{layer}"] = loads.count(0) / E
            found[f"moe/load_entropy/{layer}"] = entropy([load / total for load in loads])
            found[f"moe/router_entropy/{layer}"] = mean_of(map(entropy, self.probabilities[layer]))
            found[f"moe/routing_confidence/{layer}"] = mean_of(self.chosen[layer])
            found |= {f"moe/load/{layer}.{expert}": load / total for expert, load in enumerate(loads)}
        for family in FAMILIES:
            values = [found[f"moe/{family}/{layer}"] for layer in self.tokens]
            found[f"moe/{family}/_min"], found[f"moe/{family}/_max"] = min(values), max(values)
            found[f"moe/{family}/_mean"] = mean_of(values)
        return found | {"muon/alarms/dead_experts": 0.0}


def entropy(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0) / math.log(len(probabilities))


def mean_of(values):
    values = list(values)
    return sum(values) / len(values)


def softmax(logits):
    return logits.softmax(-1)


@pytest.mark.parametrize(
    ("kind", "scoring", "layers"),
    [(mixtral, softmax, 3), (qwen, softmax, 3), (deepseek, torch.sigmoid, 2), (moe_lm, None, 2)],
)
def test_all_values_against_a_slow_count(kind, scoring, layers):
    model = build(kind)
    witness, loads = Witness(model, scoring), lm.ExpertLoads(model, mode="detailed")
    loads.start()
    for micro_batch in (1, 2, 3):
        loss_of(model, token_ids(micro_batch)).backward()
    found = loads.collect()
    assert len(witness.tokens) == layers
    assert found == pytest.approx(witness.values(), rel=1e-5)
    brief = build(kind)
    witness, loads = Witness(brief, scoring), lm.ExpertLoads(brief)
    loads.start()
    loss_of(brief, token_ids(2))
    expected = {key: value for key, value in witness.values().items() if not key.startswith("moe/load/")}
    assert loads.collect() == pytest.approx(expected, rel=1e-5)


def test_counts_from_start_to_collect_in_training_mode_only():
    model = build(deepseek)
    loads = lm.ExpertLoads(model, mode="detailed")
    loss_of(model, token_ids(3))
    loads.start()
    model.eval()
    loss_of(model, token_ids(4))
    model.train()
    witness = Witness(model, torch.sigmoid)
    loss_of(model, token_ids(1))
    found = loads.collect()
    assert found == pytest.approx(witness.values(), rel=1e-5)
    assert not loads.is_counting
    with pytest.raises(ValueError, match=r"call start\(\)"):
        loads.collect()
    loads.start()
    loss_of(model, token_ids(5))
    loads.start()  # forgets
    loss_of(model, token_ids(1))
    assert loads.collect() == pytest.approx(found, rel=1e-6)


def checkpointed(model, use_reentrant):
    for block in model.model.layers:
        forward = block.forward

        def again(*args, forward=forward, **kwargs):
            return checkpoint(lambda *a: forward(*a, **kwargs), *args, use_reentrant=use_reentrant)

        block.forward = again
    return model


def count_calls(model):
    calls = Counter()
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", [mixtral, moe_lm])
def test_what_checkpointing_computes_again_is_not_counted_twice(kind, use_reentrant):
    """Of two micro-batches one has no backward: that its tokens weigh as much as the other's shows the count."""
    values = []
    for model in (build(kind), checkpointed(build(kind), use_reentrant)):
        calls = count_calls(model)
        loads = lm.ExpertLoads(model, mode="detailed")
        loads.start()
        with torch.no_grad():
            loss_of(model, token_ids(3))
        loss_of(model, token_ids(2)).backward()
        values.append(loads.collect())
        again = set(calls.values())
    assert again == {3}  # it did compute again
    assert values[1] == values[0]


class TopK(nn.Linear):
    """A router as transformers has them."""

    def forward(self, x):
        logits = super().forward(x)
        weights, experts = logits.softmax(-1).topk(2)
        return logits, weights, experts


class Block(nn.Module):
    def __init__(self, router):
        super().__init__()
        self.gate, self.experts = router, nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        self.gate(x)
        return self.experts[0](x)


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(*[Block(TopK(4, 5)) for _ in range(3)])


@pytest.fixture
def compiler():
    yield torch.compile
    torch.compiler.reset()


@pytest.mark.parametrize("way", ["whole", "blocks", "blocks computed again"])
def test_compiled_models(way, compiler):
    plain, model = blocks(), blocks()
    loads, compiled_loads = (lm.ExpertLoads(one, mode="detailed") for one in (plain, model))
    run = compiler(model, backend="aot_eager", fullgraph=True) if way == "whole" else model
    if way != "whole":
        for block in model:
            block.compile(backend="aot_eager", fullgraph=True)
    if way == "blocks computed again":  # by the compiled code

        def run(x):
            for block in model:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    for number in (1, 2, 3):
        if number != 2:
            loads.start()
            compiled_loads.start()
        x, more = torch.randn(2, 20, 4)
        for one in (plain, run):
            one(more)  # no backward
            one(x).sum().backward()
        if number != 2:
            assert compiled_loads.collect() == pytest.approx(loads.collect(), rel=1e-5)


def test_a_model_that_was_compiled_before_is_told(compiler):
    model = blocks()
    run = compiler(model, backend="eager")
    run(torch.randn(20, 4))
    loads = lm.ExpertLoads(model)
    loads.start()
    run(torch.randn(20, 4))
    with pytest.warns(UserWarning, match=r"torch\.compiler\.reset"):
        assert loads.collect() == {"muon/alarms/dead_experts": 0.0}


def test_the_model_is_not_changed():
    model, other = build(moe_lm), build(moe_lm)
    loads = lm.ExpertLoads(model)
    loads.start()
    for one in (model, other):
        loss_of(one, token_ids(2)).backward()
    loads.collect()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    assert model.state_dict().keys() == other.state_dict().keys()
    hooked = [module for module in model.modules() if module._forward_hooks]
    assert len(hooked) == 2
    loads.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_filters_and_wrappers():
    model = build(mixtral)
    layers = {f"moe/max_vio/model.layers.{number}.mlp" for number in range(3)}
    for options, expected in [
        ({"include": r"layers\.[01]", "exclude": r"\.1\."}, {"moe/max_vio/model.layers.0.mlp"}),
        ({"routers": r"mlp\.gate$"}, layers),
    ]:
        loads = lm.ExpertLoads(torch.compile(model, backend="eager"), **options)
        loads.start()
        loss_of(model, token_ids(1))
        keys = {key for key in loads.collect() if key.startswith("moe/max_vio/model")}
        assert keys == expected
        loads.close()


def read_logits(module, inputs, output):
    return output.topk(2).indices, output.softmax(-1), output.shape[-1]


def test_a_reading_of_the_users_own():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": Block(nn.Linear(4, 3)), "choose": nn.Linear(4, 5)})
    loads = lm.ExpertLoads(model, routers=r"gate|choose", read=read_logits, mode="detailed")
    loads.start()
    x = torch.randn(20, 4)
    model["a"](x), model["choose"](x)
    found = loads.collect()
    for layer, router in (("a", model["a"].gate), ("choose", model["choose"])):
        picks = [pick for row in router(x).topk(2).indices.tolist() for pick in row]
        size = router.out_features
        assert [found[f"moe/load/{layer}.{e}"] for e in range(size)] == [picks.count(e) / 40 for e in range(size)]
        entropies = map(entropy, router(x).softmax(-1).tolist())
        assert found[f"moe/router_entropy/{layer}"] == pytest.approx(mean_of(entropies), rel=1e-5)


def test_scores_of_a_top_1_router_are_not_told_from_logits():
    """Its weights, each the whole of its token's, are in proportion to anything."""
    router = TopK(4, 5)
    router.forward = lambda x: (x, x.softmax(-1).amax(-1, keepdim=True), x.argmax(-1, keepdim=True))
    loads = lm.ExpertLoads(nn.ModuleDict({"moe": Block(router)}))
    loads.start()
    router(torch.randn(10, 5))
    families = {key.split("/")[1] for key in loads.collect()} - {"alarms"}
    assert families == set(FAMILIES) - {"router_entropy", "routing_confidence"}


def test_two_routers_in_one_module_are_two_layers():
    model = nn.ModuleDict({"moe": nn.ModuleDict({"gate": TopK(4, 5), "router": TopK(4, 3), "experts": nn.Identity()})})
    loads = lm.ExpertLoads(model)
    loads.start()
    for name in ("gate", "router"):
        model["moe"][name](torch.randn(10, 4))
    found = loads.collect()
    assert {"moe/max_vio/moe.gate", "moe/max_vio/moe.router"} <= found.keys()


class Returns(nn.Module):
    num_experts = None

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


@pytest.mark.parametrize(
    "output",
    [
        torch.rand(5, 3),
        (torch.rand(5, 3), torch.rand(5, 2)),
        (torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 2, dtype=torch.int64), torch.rand(5, 3)),
        (torch.zeros(5, 3, dtype=torch.int64), torch.rand(5, 1), torch.rand(5, 3)),  # a mask, not choices
        (torch.zeros(5, 2, dtype=torch.int64), torch.rand(5, 2)),  # of how many experts?
    ],
)
def test_an_output_that_is_not_understood(output):
    model = Block(Returns(output))
    if output[0].shape == (5, 3):
        model.gate.num_experts = 3
    loads = lm.ExpertLoads(model)
    model(torch.rand(5, 4))
    loads.start()
    with pytest.raises(TypeError, match=r"router Returns returns is not understood.*Pass read="):
        model(torch.rand(5, 4))


@pytest.mark.parametrize(
    "given",
    [
        torch.zeros(5, 2, dtype=torch.int64),
        (torch.zeros(5, 2), None, 3),
        (torch.zeros(5, 2, dtype=torch.int64), torch.rand(5, 4), 3),
        (torch.zeros(5, 2, dtype=torch.int64), None, 0),
    ],
)
def test_a_reading_that_gives_something_else(given):
    model = Block(Returns(None))
    loads = lm.ExpertLoads(model, read=lambda *_: given)
    loads.start()
    with pytest.raises(TypeError, match=r"read= has to return \(experts, scores, num_experts\)"):
        model(torch.rand(5, 4))


def test_errors_at_the_start():
    with pytest.raises(ValueError, match="No router of experts found in Linear: no module called 'gate' or 'router'"):
        lm.ExpertLoads(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"include='nowhere' and exclude=None leave"):
        lm.ExpertLoads(Block(nn.Linear(4, 3)), include="nowhere")
    with pytest.raises(ValueError, match="no module's name matches routers='switch'"):
        lm.ExpertLoads(Block(nn.Linear(4, 3)), routers="switch")
    with pytest.raises(ValueError, match="mode='verbose'"):
        lm.ExpertLoads(Block(nn.Linear(4, 3)), mode="verbose")


def test_a_starved_expert_is_warned_of_once(recwarn):
    model = Block(Returns(None))
    loads = lm.ExpertLoads(model, read=lambda *_: (torch.tensor([[0, 1], [1, 3]]), None, 4))
    standing = []
    for step in range(50, 1300, 50):
        loads.start()
        model(torch.rand(2, 4))
        standing.append(loads.collect(step)["muon/alarms/dead_experts"])
    assert standing == [0.0] * 19 + [1.0] * 6
    (warning,) = [str(one.message) for one in recwarn if "no token" in str(one.message)]
    assert warning.startswith("gate.2: this expert has had no token since step 50, in 20 measurements.")
