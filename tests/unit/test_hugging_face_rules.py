"""Fused projections known by the classes of their modules, without `transformers`."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lightning_muon as lm


def attention(name, projection, features, inputs=8, bases=(), **attributes):
    """A module of a class of this name that holds one projection."""
    module = type(name, (*bases, nn.Module), {})()
    setattr(module, projection, nn.Linear(inputs, features, bias=False))
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


def experts(shape=(4, 6, 5), **attributes):
    module = type("AnyExperts", (nn.Module,), {})()
    module.gate_up_proj = nn.Parameter(torch.randn(shape))
    module.down_proj = nn.Parameter(torch.randn(shape[0], 5, 3))
    for key, value in attributes.items():
        setattr(module, key, value)
    return nn.ModuleDict({"mlp": module})


def routes(module, **options):
    return lm.Muon(module, **options).routes


def neox(heads=2, **options):
    config = SimpleNamespace(num_attention_heads=heads)
    return attention("GPTNeoXAttention", "query_key_value", 24, config=config, **options)


def test_a_known_class_needs_no_rule():
    decision = routes(nn.ModuleDict({"attention": neox()}))["attention.query_key_value.weight"]
    assert decision.rule == "fused q, k, v by heads"
    assert decision.layout.describe() == "3 x (8, 8) interleaved in 2 runs"


def test_subclasses_are_known_too():
    """FSDP makes one for every module that it wraps."""
    own = neox()
    own.__class__ = type("FSDPGPTNeoXAttention", (type(own),), {})
    assert routes(own)["query_key_value.weight"].layout.interleaved == 2


def test_rules_and_marks_come_before_what_is_known():
    rule = lm.Rule("query_key_value", split_sizes=(8, 8, 8), num_heads=2, interleaved=2)
    assert routes(neox(), rules=[rule])["query_key_value.weight"].layout.describe() == "6 x (4, 8)"
    assert (
        routes(neox(), rules=[lm.Rule("query_key", algorithm="adamw")])["query_key_value.weight"].algorithm == "adamw"
    )


def test_what_adamw_trains_is_read_in_the_same_way():
    rule = lm.Rule("query_key_value", algorithm="adamw")
    assert routes(neox(), rules=[rule])["query_key_value.weight"].layout.interleaved == 2


@pytest.mark.parametrize(
    ("module", "fault"),
    [
        (neox(heads=5), "interleaved=5 must divide"),
        (
            attention("GPTNeoXAttention", "query_key_value", 24),
            "of GPTNeoXAttention is fused.*'config'.*Say how: rules=",
        ),
        (
            attention("BloomAttention", "query_key_value", 25, num_heads=2),
            r"\(8, 8, 8\) of 25 output features.*Say how",
        ),
        (
            attention("Phi3Attention", "qkv_proj", 8, num_key_value_heads=4, head_dim=4),
            r"split_sizes=\(-24, 16, 16\) must be positive",
        ),
    ],
)
def test_a_known_class_of_another_kind_is_an_error(module, fault):
    with pytest.raises(ValueError, match=rf"(query_key_value|qkv_proj)\.weight' of shape .*{fault}"):
        lm.Muon(nn.ModuleDict({"attention": module}))


def test_an_order_that_nobody_knows_is_not_guessed():
    """Neither of an unknown class nor where only names are given."""
    unknown = attention("OtherAttention", "query_key_value", 24)
    for params in (unknown, neox().named_parameters()):
        decision = routes(params)["query_key_value.weight"]
        assert decision.layout.describe() == "(24, 8)"
        assert "order unknown" in decision.rule


def test_experts_say_how_they_are_stored():
    options = {"is_transposed": False, "is_concatenated": True}
    found = routes(experts(**options))
    assert found["mlp.gate_up_proj"].layout.describe() == "8 x (3, 5)"
    assert found["mlp.down_proj"].layout.describe() == "4 x (5, 3)"
    found = routes(experts((4, 5, 6), is_transposed=True, is_concatenated=False))
    layout = found["mlp.gate_up_proj"].layout
    assert (layout.dim, layout.sizes, layout.interleaved, layout.transposed) == (1, (3, 3), 3, True)
    assert found["mlp.down_proj"].layout.transposed


def experts_of_odd_width():
    return experts((4, 6, 5), is_transposed=True, is_concatenated=True)


def test_experts_that_cannot_be_halved_are_an_error():
    with pytest.raises(ValueError, match=r"'mlp\.gate_up_proj' of shape \(4, 6, 5\): split_sizes=\(2, 2\)"):
        lm.Muon(experts_of_odd_width())


def test_fused_experts_of_an_unknown_kind_are_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"'mlp\.gate_up_proj'.*split_sizes, and transposed=True.*is given the model"):
        lm.Muon(experts())


@pytest.mark.parametrize("name", ["gate_up_proj_bias", "A_log", "scale"])
def test_what_is_no_matrix_though_of_two_dimensions(name):
    module = nn.Module()
    setattr(module, name, nn.Parameter(torch.randn(4, 6)))
    decision = routes(nn.ModuleDict({"experts": module}))[f"experts.{name}"]
    assert (decision.algorithm, decision.rule, decision.layout) == ("adamw", "element by element", None)


def test_wrappers_do_not_hide_the_class():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self._checkpoint_wrapped_module = inner

    wrapped = neox()
    wrapped.query_key_value = Wrapper(wrapped.query_key_value)
    for model in (wrapped, Wrapper(wrapped)):
        assert routes(model) == routes(neox())


def test_stacks_that_do_not_fit_are_errors():
    expert = type("DbrxExpertGLU", (nn.Module,), {})()
    expert.w1 = nn.Parameter(torch.randn(10, 6))
    with pytest.raises(ValueError, match=r"'w1' .*cut in none of the ways .*AttributeError"):
        lm.Muon(expert)
    expert.moe_num_experts = 4
    with pytest.raises(ValueError, match="4 matrices in 10 rows"):
        lm.Muon(expert)


def test_a_subclass_of_conv1d_is_transposed_too():
    base = type("Conv1D", (nn.Module,), {})
    layer = type("FSDPConv1D", (base,), {})()
    layer.weight = nn.Parameter(torch.randn(4, 12))
    model = nn.ModuleDict({"c_attn": layer})
    assert lm.Muon(model).routes["c_attn.weight"].layout.describe() == "3 x (4, 4)"
    assert lm.Muon(model).routes["c_attn.weight"].layout.transposed


def test_interleaved_by_itself_is_refused():
    layer = nn.Linear(4, 12, bias=False)
    with pytest.raises(ValueError, match="say their sizes"):
        lm.Muon([{"params": list(layer.named_parameters()), "interleaved": 3}])


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (attention("GPT2Attention", "c_attn", 24, is_cross_attention=True), "2 x (12, 8)"),
        (attention("GPT2Attention", "c_attn", 24, is_cross_attention=False), "3 x (8, 8)"),
        (
            attention("GPTNeoXJapaneseAttention", "query_key_value", 24, num_attention_heads=4, head_size=2),
            "3 x (8, 8) interleaved in 4 runs",
        ),
        (attention("ZambaMambaMixer", "in_proj", 12), "2 x (6, 8) interleaved in 6 runs"),
        (attention("MambaMixer", "x_proj", 10, time_step_rank=4, ssm_state_size=3), "(4, 8), 2 x (3, 8)"),
        (attention("MoshiGatingMLP", "fc1", 12), "2 x (6, 8)"),
        (
            attention("AXK2Attention", "q_gate_proj", 20, num_heads=2, qk_head_dim=6, v_head_dim=4),
            "(12, 8), (8, 8) interleaved in 2 runs",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_how_known_classes_are_cut(module, said):
    (found,) = routes(module).values()
    assert found.layout.describe() == said


def test_a_linear_layer_of_groups_is_a_stack():
    layer = type("DeepseekV4GroupedLinear", (nn.Linear,), {})(5, 12, bias=False)
    layer.n_groups = 3
    (found,) = routes(nn.ModuleDict({"o_a_proj": layer})).values()
    assert found.layout.describe() == "3 x (4, 5)"
