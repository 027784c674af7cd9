import pytest
import torch
from torch import nn

import lightning_muon as lm


def routes(module, **kwargs):
    return lm.Muon(module, **kwargs).routes


class Net(nn.Module):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def single(child, name="layer", **kwargs):
    return routes(Net(**{name: child}), **kwargs)[f"{name}.weight"]


@pytest.mark.parametrize(
    ("child", "name", "algorithm", "matrices"),
    [
        (nn.Linear(6, 4, bias=False), "proj", "muon", "(4, 6)"),
        (nn.Linear(6, 1, bias=False), "proj", "adamw", None),
        (nn.Linear(1, 6, bias=False), "proj", "adamw", None),
        (nn.Embedding(10, 4), "anything", "adamw", "(10, 4)"),
        (nn.Linear(6, 4, bias=False), "lm_head", "adamw", "(4, 6)"),
        (nn.Linear(6, 18, bias=False), "qkv_proj", "muon", "3 x (6, 6)"),
        (nn.Linear(6, 10, bias=False), "qkv_proj", "muon", "(10, 6)"),
        (nn.Linear(6, 8, bias=False), "gate_up_proj", "muon", "2 x (4, 6)"),
        (nn.Conv2d(4, 8, 3, bias=False), "conv", "muon", "(8, 36)"),
        (nn.Conv2d(4, 8, 3, groups=2, bias=False), "conv", "muon", "2 x (4, 18)"),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), "conv", "adamw", None),
        (nn.ConvTranspose1d(4, 6, 3, bias=False), "conv", "muon", "(4, 18)"),
    ],
)
def test_built_in_rules(child, name, algorithm, matrices):
    decision = single(child, name)
    assert decision.algorithm == algorithm
    assert (decision.layout.describe() if decision.layout else None) == matrices


def test_recurrent_attention_and_vector_parameters():
    found = routes(Net(lstm=nn.LSTM(4, 5), attention=nn.MultiheadAttention(6, 2), norm=nn.LayerNorm(6)))
    assert found["lstm.weight_ih_l0"].layout.describe() == "4 x (5, 4)"
    assert found["attention.in_proj_weight"].layout.describe() == "3 x (6, 6)"
    assert found["attention.out_proj.weight"].layout.describe() == "(6, 6)"
    assert {found[name].algorithm for name in ("lstm.bias_ih_l0", "norm.weight", "attention.in_proj_bias")} == {"adamw"}


def test_stack_of_experts():
    module = Net()
    module.experts_up = nn.Parameter(torch.randn(8, 5, 3))
    assert routes(module)["experts_up"].layout.describe() == "8 x (5, 3)"


def test_gpt2_conv1d_is_read_transposed():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(18, 6)  # (in, out) = (6, 18)
    decision = routes(Net(c_attn=conv1d))["c_attn.weight"]
    assert decision.layout.describe() == "3 x (6, 6)"
    assert decision.layout.transposed


def test_unrouted_parameter_is_an_error_that_names_the_fix():
    module = Net()
    module.mystery = nn.Parameter(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match=r"No rule says how to train 'mystery' .*lm\.Rule"):
        lm.Muon(module)
    assert routes(module, rules=[lm.Rule("mystery")])["mystery"].layout.describe() == "2 x (3, 4)"


def test_fused_experts_must_be_said():
    module = Net()
    module.experts = Net()
    module.experts.gate_up_proj = nn.Parameter(torch.randn(4, 6, 5))
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj"):
        lm.Muon(module)
    found = routes(module, rules=[lm.Rule("gate_up_proj", split_sizes=(3, 3))])
    assert found["experts.gate_up_proj"].layout.describe() == "8 x (3, 5)"


def test_rules_come_first_and_must_match():
    module = Net(router=nn.Linear(6, 4, bias=False), lm_head=nn.Linear(6, 4, bias=False))
    found = routes(module, rules=[lm.Rule("router", algorithm="adamw"), lm.Rule("lm_head")])
    assert found["router.weight"].algorithm == "adamw"
    assert found["lm_head.weight"].algorithm == "muon"
    with pytest.raises(ValueError, match="is in no parameter's name"):
        lm.Muon(module, rules=[lm.Rule("ruoter")])


def test_a_rule_about_a_weight_passes_over_its_bias():
    found = routes(Net(qkv=nn.Linear(6, 12)), rules=[lm.Rule("qkv", split_sizes=(6, 3, 3))])
    assert found["qkv.weight"].layout.describe() == "(6, 6), 2 x (3, 6)"
    assert found["qkv.bias"].algorithm == "adamw"


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"lm\.Rule\('a\[' ?\) is no regular expression"):
        lm.Rule("a[")


def test_marks_and_group_options():
    module = Net(q=nn.Linear(6, 8, bias=False), k=nn.Linear(6, 4, bias=False))
    lm.mark(module.q.weight, num_heads=4)
    assert routes(module)["q.weight"].layout.describe() == "4 x (2, 6)"
    groups = [
        {"params": [("q.weight", module.q.weight)], "lr": 0.5},
        {"params": [("k.weight", module.k.weight)], "algorithm": "adamw", "name": "keys", "betas": (0.8, 0.9)},
    ]
    optimizer = lm.Muon(groups, lr=0.1, adamw_lr=0.2)
    assert [(g["name"], g["algorithm"], g["lr"]) for g in optimizer.param_groups] == [
        ("muon", "muon", 0.5),
        ("keys", "adamw", 0.2),
    ]
    assert optimizer.param_groups[1]["betas"] == (0.8, 0.9)


def test_heads_of_grouped_query_attention():
    module = Net(qkv=nn.Linear(6, 16, bias=False))
    rule = lm.Rule("qkv", split_sizes=(8, 4, 4), num_heads=(4, 2, 2))
    assert routes(module, rules=[rule])["qkv.weight"].layout.describe() == "8 x (2, 6)"


@pytest.mark.parametrize(
    "rule",
    [
        lm.Rule("q", split_sizes=(3, 4)),
        lm.Rule("q", num_heads=3),
        lm.Rule("q", split_sizes=(4, 4), num_heads=(1, 2, 4)),
    ],
)
def test_options_that_do_not_fit_are_refused(rule):
    with pytest.raises(ValueError, match=r"'q\.weight' of shape \(8, 6\), rule 'q'"):
        lm.Muon(Net(q=nn.Linear(6, 8, bias=False)), rules=[rule])


def test_tied_weights_count_once_and_go_where_the_embedding_goes():
    module = Net(decoder=nn.Linear(4, 10, bias=False), embed=nn.Embedding(10, 4))
    module.embed.weight = module.decoder.weight
    optimizer = lm.Muon(module)
    assert [name for name, _ in optimizer.named_parameters()] == ["decoder.weight"]
    assert optimizer.routes["decoder.weight"].algorithm == "adamw"


def test_frozen_parameters_are_left_out():
    module = Net(a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    module.a.requires_grad_(False)
    assert set(routes(module)) == {"b.weight", "b.bias"}
    module.b.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        lm.Muon(module)


def test_parameters_without_names_are_refused():
    with pytest.raises(TypeError, match="named_parameters"):
        lm.Muon(nn.Linear(3, 3).parameters())


def test_wrappers_leave_no_trace_in_names():
    plain = Net(a=nn.Linear(3, 3))
    assert set(routes(torch.compile(plain))) == {"a.weight", "a.bias"}


def test_module_is_a_name_like_any_other():
    plain, compiled = Net(), Net()
    plain.module, compiled.module = nn.Linear(3, 3), torch.compile(nn.Linear(3, 3))
    assert set(routes(plain)) == set(routes(compiled)) == {"module.weight", "module.bias"}


@pytest.mark.parametrize(
    ("path", "algorithm"),
    [
        ("time_embedding.0.weight", "muon"),
        ("patch_embed.proj.weight", "muon"),
        ("layers.3.attention.output.weight", "muon"),
        ("output.weight", "adamw"),
        ("model.lm_head.weight", "adamw"),
    ],
)
def test_projections_are_not_mistaken_for_embeddings_and_heads(path, algorithm):
    module = outer = Net()
    *parents, last, _ = path.split(".")
    for name in parents:
        setattr(module, name, Net())
        module = getattr(module, name)
    setattr(module, last, nn.Linear(6, 4, bias=False))
    assert routes(outer)[path].algorithm == algorithm


@pytest.mark.parametrize(("name", "algorithm"), [("wte.weight", "adamw"), ("h.0.attn.weight", "muon")])
def test_names_alone_tell_embeddings_where_no_module_is_given(name, algorithm):
    assert lm.Muon([(name, nn.Parameter(torch.zeros(4, 3)))]).routes[name].algorithm == algorithm


def test_transposed_stacks_can_be_split():
    module = Net()
    module.experts_gate_up = nn.Parameter(torch.zeros(4, 6, 10))  # (experts, in, gate and up)
    found = routes(module, rules=[lm.Rule("experts", split_sizes=(5, 5), transposed=True)])
    assert found["experts_gate_up"].layout.describe() == "8 x (6, 5)"


def test_explain_names_every_parameter_and_rule():
    module = Net(embed=nn.Embedding(10, 4), qkv=nn.Linear(4, 12), lm_head=nn.Linear(4, 10))
    text = lm.Muon(module, rules=[lm.Rule("lm_head.weight")]).explain()
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    for name, _ in module.named_parameters():
        assert name in lines
    assert "3 x (4, 4)" in lines["qkv.weight"]
    assert "fused q, k, v" in lines["qkv.weight"]
    assert "0.4" in lines["qkv.weight"]  # 0.2·√4
    assert "rule 'lm_head.weight'" in lines["lm_head.weight"]
    assert "torch.float32 on cpu" in text
