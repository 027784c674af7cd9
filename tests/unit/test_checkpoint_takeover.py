"""Going on from other optimizers: what is kept, and what the next steps are."""

import copy

import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

import lightning_muon as lm
from tests.models import awkward_model, token_batches
from tests.references import relative_error

MATRICES = ["square.weight", "tall.weight", "wide.weight", "one_row.weight", "one_col.weight"]
TORCH = {"lr": 2e-3, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
ADAMW = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
OURS = {
    "lr": 2e-3,
    "adamw_lr": 0.01,
    "orthogonalization": "keller5",
    "orthogonalization_dtype": torch.bfloat16,
    # torch's Muon takes 2-D matrices whole
    "rules": [lm.Rule("|".join(MATRICES)), lm.Rule(".", "adamw")],
}


def split(model):
    named = dict(model.named_parameters())
    return {name: named[name] for name in MATRICES}, {n: p for n, p in named.items() if n not in MATRICES}


def torchs(model, with_names=False):
    matrices, rest = split(model)
    pairs = (matrices.items(), rest.items()) if with_names else (matrices.values(), rest.values())
    return torch.optim.Muon(list(pairs[0]), **TORCH), torch.optim.AdamW(list(pairs[1]), **ADAMW)


def step_with(model, optimizers, seeds):
    """Given gradients: those of a loss would carry the matrices' bfloat16 rounding to every other parameter."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def train(model, optimizers, batches):
    for tokens in batches:
        model.zero_grad()
        model.loss(tokens).backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("with_names", [True, False], ids=["names saved", "names given"])
def test_the_next_steps_are_those_of_the_uninterrupted_run(with_names):
    model = awkward_model()
    optimizers = torchs(model, with_names)
    step_with(model, optimizers, range(10))
    weights = copy.deepcopy(model.state_dict())
    other = awkward_model(seed=1)
    other.load_state_dict(weights)
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    step_with(model, optimizers, range(10, 15))

    optimizer = lm.Muon(other, **OURS)
    names = [list(part) for part in split(model)]
    report = lm.take_over(optimizer, *(states if with_names else zip(states, names, strict=True)))
    for index, name in enumerate(MATRICES):
        momentum = states[0]["state"][index]["momentum_buffer"]
        assert torch.equal(kept(optimizer, name)["momentum_buffer"], momentum)
    step_with(other, [optimizer], range(10, 15))
    for name, param in model.named_parameters():
        found, expected = other.get_parameter(name).detach(), param.detach()
        assert relative_error(found, expected) <= (5e-3 if name in MATRICES else 1e-6), name
        assert relative_error(found - weights[name], expected - weights[name]) <= 0.03, name
    assert "18 of 18 parameters" in report.splitlines()[-1]
    assert any(line.split()[0] == "square.weight" and "bit for bit" in line for line in report.splitlines() if line)


def test_a_fresh_start_would_be_another_run():
    """The test above can fail: without the momentum the steps are far off its tolerance."""
    model = awkward_model()
    optimizers = torchs(model)
    step_with(model, optimizers, range(10))
    before, other = model.square.weight.detach().clone(), copy.deepcopy(model)
    step_with(model, optimizers, range(10, 15))
    step_with(other, [lm.Muon(other, **OURS)], range(10, 15))
    moved, should = other.square.weight.detach() - before, model.square.weight.detach() - before
    assert relative_error(moved, should) > 0.2


def kept(optimizer, name):
    return optimizer.state[dict(optimizer.named_parameters())[name]]


def test_heavy_ball_is_scaled_to_an_average():
    gradients = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    ball, average = torch.zeros(4, 3), torch.zeros(4, 3)
    for gradient in gradients:
        ball = 0.9 * ball + gradient
        average = 0.9 * average + 0.1 * gradient
    optimizer = lm.Muon([("w", nn.Parameter(torch.zeros(4, 3)))])
    state = {"state": {0: {"momentum_buffer": ball}}, "param_groups": [{"params": [0], "momentum": 0.9}]}
    report = lm.take_over(optimizer, (state, ["w"]), momentum="heavy_ball")
    torch.testing.assert_close(kept(optimizer, "w")["momentum_buffer"], average)
    assert "times 0.1, as heavy ball" in report
    del state["param_groups"][0]["momentum"]
    lm.take_over(optimizer, (state, ["w"]), momentum="heavy_ball")
    torch.testing.assert_close(kept(optimizer, "w")["momentum_buffer"], ball * 0.05)


def test_a_model_that_adamw_alone_has_trained():
    model = awkward_model()
    adamw = torch.optim.AdamW(model.named_parameters(), **ADAMW)
    train(model, [adamw], token_batches(5, 4))
    optimizer = lm.Muon(model, lr=0.3)
    report = lm.take_over(optimizer, adamw.state_dict())
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]
    for name, param in model.named_parameters():
        before, now = adamw.state[param], kept(optimizer, name)
        if optimizer.routes[name].algorithm == "muon":
            assert torch.equal(now["momentum_buffer"], before["exp_avg"])
        else:
            assert torch.equal(now["exp_avg_sq"], before["exp_avg_sq"])
            assert now["step"] == 5
    assert "starts the momentum" in report
    train(model, [optimizer], token_batches(1, 4))


def test_what_cannot_be_kept_starts_fresh_and_is_said():
    model = awkward_model()
    state = {
        "state": {0: {"momentum_buffer": torch.ones(9)}, 1: {"strange": torch.ones(21, 21)}},
        "param_groups": [{"params": [0, 1, 2], "param_names": ["norm.weight", "square.weight", "tall.weight"]}],
    }
    optimizer = lm.Muon(model)
    lines = {line.split()[0]: line for line in lm.take_over(optimizer, state).splitlines() if line}
    assert "AdamW needs exp_avg, exp_avg_sq and step in momentum_buffer" in lines["norm.weight"]
    assert "no momentum in strange" in lines["square.weight"]
    assert "no step yet" in lines["tall.weight"]
    assert "in none of the saved states" in lines["wide.weight"]
    assert "0 of 18 parameters" in " ".join(lines.values())
    assert not any(
        value.any() for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    )


def good_state():
    return {
        "state": {0: {"momentum_buffer": torch.ones(21, 21)}},
        "param_groups": [{"params": [0], "param_names": ["square.weight"]}],
    }


@pytest.mark.parametrize(
    ("saved", "match"),
    [
        (lambda good: [(good, ["square"])], r"does not train: square\..*Nothing has been changed"),
        (lambda good: [(good, ["tall.weight"])], r"'tall\.weight' has shape \(21, 21\), the parameter \(63, 21\)"),
        (lambda good: [(good, ["square.weight", "tall.weight"])], "had 1 parameters, and 2 names"),
        (lambda good: [good, good], "Two of the saved states are of 'square.weight'"),
        (lambda good: [{"state": {}, "param_groups": [{"params": [0]}]}], "has no names of parameters"),
        (lambda good: [lm.Muon(awkward_model()).state_dict()], "load_state_dict"),
        (lambda good: [good["state"]], "must be the state_dict"),
    ],
    ids=["unknown", "shape", "count", "twice", "no names", "ours", "no state"],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(saved, match):
    optimizer = lm.Muon(awkward_model())
    lm.take_over(optimizer, good_state())
    with pytest.raises(ValueError, match=match):
        lm.take_over(optimizer, *saved(good_state()))
    assert kept(optimizer, "square.weight")["momentum_buffer"].eq(1).all()


def test_through_the_trainers_wrapper():
    optimizer = lm.Muon(awkward_model())
    lm.take_over(LightningOptimizer(optimizer), good_state())
    assert kept(optimizer, "square.weight")["momentum_buffer"].eq(1).all()


def test_other_optimizers_and_unknown_conventions_are_refused():
    with pytest.raises(TypeError, match="not to AdamW"):
        lm.take_over(torch.optim.AdamW(nn.Linear(2, 2).parameters()))
    with pytest.raises(ValueError, match="choose 'ema' or 'heavy_ball'"):
        lm.take_over(lm.Muon(awkward_model()), momentum="nesterov")
