"""The optimizer against outside oracles, and its manners as a torch optimizer."""

import copy
import math

import pytest
import torch
from torch import nn

import lightning_muon as lm
from tests.models import awkward_model, token_batches
from tests.references import MoonlightMuon, relative_error

SHAPES = [(16, 16), (63, 63), (12, 40), (40, 12)]
KELLER = {"orthogonalization": "keller5", "lr": 0.02, "weight_decay": 0.1}


def matrices(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in SHAPES]


def named(params):
    return [(f"p{number}", param) for number, param in enumerate(params)]


def gradients(step, dtype):
    return matrices(dtype, seed=100 + step)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_moonlights_equations(dtype, nesterov, weight_decay):
    options = {**KELLER, "weight_decay": weight_decay}
    params = [nn.Parameter(m) for m in matrices(dtype)]
    references = [MoonlightMuon(p.detach(), lr=0.02, weight_decay=weight_decay, nesterov=nesterov) for p in params]
    optimizer = lm.Muon(named(params), nesterov=nesterov, orthogonalization_dtype=torch.float32, **options)
    for step in range(10):
        for param, reference, gradient in zip(params, references, gradients(step, dtype), strict=True):
            param.grad = gradient
            reference.step(gradient)
        optimizer.step()
    for param, reference in zip(params, references, strict=True):
        assert param.dtype == dtype
        # a bfloat16 weight may fall on the other side of a tie: 1e-6 of the update decides an eighth of a per cent
        assert relative_error(param.detach(), reference.weight) <= (1e-5 if dtype == torch.float32 else 5e-4)


# bf16 without Nesterov is compared with Moonlight's equations only: torch <= 2.14 normalises that momentum in place.
@pytest.mark.parametrize(("dtype", "nesterov"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)])
def test_equals_torch_muon_and_adamw(dtype, nesterov):
    # A small step: torch decays a bf16 weight in a rounding of its own, which loses a factor of 1 - 0.02·0.1 entirely.
    options = {**KELLER, "lr": 2e-3}
    ours, theirs = ([nn.Parameter(m) for m in matrices(dtype)] for _ in range(2))
    vectors = [[nn.Parameter(torch.linspace(-1, 1, 9).to(dtype)) for _ in range(2)] for _ in range(2)]
    optimizer = lm.Muon(
        [*named(ours), ("v.0", vectors[0][0]), ("v.1", vectors[0][1])],
        nesterov=nesterov,
        orthogonalization_dtype=torch.bfloat16,
        adamw_lr=0.01,
        **options,
    )
    muon = torch.optim.Muon(theirs, lr=2e-3, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(vectors[1], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(10):
        for mine, other, gradient in zip(ours, theirs, gradients(step, dtype), strict=True):
            mine.grad, other.grad = gradient.clone(), gradient.clone()
        for mine, other in zip(*vectors, strict=True):
            mine.grad = torch.sin(mine.detach() * (step + 1))
            other.grad = mine.grad.clone()
        optimizer.step()
        muon.step()
        adamw.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine.detach(), other.detach()) <= 5e-3
    for mine, other in zip(*vectors, strict=True):
        assert relative_error(mine.detach(), other.detach()) <= 1e-6


@pytest.mark.parametrize(
    ("scale", "factor"),
    [
        ("match_rms_adamw", lambda r, c: 0.2 * math.sqrt(max(r, c))),
        ("original", lambda r, c: math.sqrt(max(1, r / c))),
        ("spectral", lambda r, c: math.sqrt(r / c)),
    ],
)
def test_scales(scale, factor):
    params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = lm.Muon(named(params), lr=1.0, scale=scale, orthogonalization="exact")
    for param, gradient in zip(params, gradients(0, torch.float32), strict=True):
        param.grad = gradient
    optimizer.step()
    for param, shape in zip(params, SHAPES, strict=True):
        sigma = torch.linalg.svdvals(param.detach())
        torch.testing.assert_close(sigma, torch.full_like(sigma, factor(*shape)), rtol=1e-4, atol=0)


def test_transposed_storage_scales_like_the_linear_it_is():
    from transformers.pytorch_utils import Conv1D

    linear, conv1d = nn.Linear(4, 9, bias=False), Conv1D(9, 4)
    conv1d.weight.data, conv1d.bias.requires_grad = linear.weight.data.T.clone(), False
    gradient = torch.randn(9, 4)
    for module, grad in ((linear, gradient), (conv1d, gradient.T.contiguous())):
        optimizer = lm.Muon(module, lr=0.1, scale="spectral")
        module.weight.grad = grad
        optimizer.step()
    torch.testing.assert_close(conv1d.weight, linear.weight.T)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_split_sizes_and_heads_equal_separate_parameters(num_heads):
    weight, gradient = torch.randn(16, 6), torch.randn(16, 6)
    fused = nn.Parameter(weight.clone())
    sizes = (8, 4, 4)
    heads = [chunk for block in weight.split(sizes) for chunk in block.chunk(num_heads)]
    separate = [nn.Parameter(head.clone()) for head in heads]
    one = lm.Muon([("w", fused)], lr=0.1, rules=[lm.Rule("w", split_sizes=sizes, num_heads=num_heads)])
    many = lm.Muon(named(separate), lr=0.1)
    fused.grad = gradient
    grads = [chunk for block in gradient.split(sizes) for chunk in block.chunk(num_heads)]
    for param, grad in zip(separate, grads, strict=True):
        param.grad = grad.clone()
    one.step()
    many.step()
    torch.testing.assert_close(fused, torch.cat(list(separate)), rtol=1e-5, atol=1e-6)


def test_stack_of_experts_equals_separate_parameters():
    weight, gradient = torch.randn(5, 8, 6), torch.randn(5, 8, 6)
    stack = nn.Parameter(weight.clone())
    experts = [nn.Parameter(w.clone()) for w in weight]
    optimizers = lm.Muon([("experts", stack)], lr=0.1), lm.Muon(named(experts), lr=0.1)
    stack.grad = gradient
    for expert, grad in zip(experts, gradient, strict=True):
        expert.grad = grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(stack, torch.stack(list(experts)), rtol=1e-5, atol=1e-6)


def test_channels_last_convolution_equals_contiguous():
    plain = nn.Conv2d(4, 8, 3)
    strided = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    assert not strided.weight.is_contiguous()
    x = torch.randn(2, 4, 5, 5)
    for module in (plain, strided):
        optimizer = lm.Muon(module, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    assert not strided.weight.is_contiguous()
    torch.testing.assert_close(strided.weight, plain.weight, rtol=1e-5, atol=1e-6)


def train(optimizer, model, steps=3):
    for tokens in token_batches(steps, 4):
        optimizer.zero_grad()
        model.loss(tokens).backward()
        optimizer.step()


def test_missing_gradient_leaves_parameter_and_momentum_alone_but_has_state():
    model = awkward_model()
    optimizer = lm.Muon(model, lr=0.1)
    before = model.square.weight.detach().clone()
    for name, param in model.named_parameters():
        param.grad = None if name == "square.weight" else torch.randn_like(param)
    optimizer.step()
    assert torch.equal(model.square.weight, before)
    assert not optimizer.state[model.square.weight]["momentum_buffer"].any()
    assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))


def test_zero_gradient_gives_no_nan():
    model = awkward_model()
    optimizer = lm.Muon(model, lr=0.1, weight_decay=0.0)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_parameter_without_elements_is_harmless():
    params = [("empty", nn.Parameter(torch.empty(0, 3))), ("full", nn.Parameter(torch.ones(3, 3)))]
    optimizer = lm.Muon(params, lr=0.1)
    for _, param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


def test_maximize_is_the_mirror():
    model, mirror = awkward_model(), awkward_model()
    up, down = lm.Muon(mirror, lr=0.1, maximize=True), lm.Muon(model, lr=0.1)
    for param, mirrored in zip(model.parameters(), mirror.parameters(), strict=True):
        param.grad = torch.randn_like(param)
        mirrored.grad = -param.grad
    up.step()
    down.step()
    for param, mirrored in zip(model.parameters(), mirror.parameters(), strict=True):
        torch.testing.assert_close(param, mirrored)


def test_closure_runs_once_with_gradients_before_the_update():
    model = awkward_model()
    optimizer = lm.Muon(model)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = model.loss(token_batches(1, 4)[0])
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    before = model.square.weight.detach().clone()
    loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.requires_grad
    assert not torch.equal(model.square.weight, before)


def test_lr_zero_and_decay_zero_are_honoured():
    model = awkward_model()
    before = model.square.weight.detach().clone()
    train(lm.Muon(model, lr=0.0, adamw_lr=0.1), model)
    assert torch.equal(model.square.weight, before)
    assert lm.Muon(model, lr=0.1, adamw_lr=0.0).param_groups[1]["lr"] == 0.0


def test_schedulers_scale_both_groups():
    optimizer = lm.Muon(awkward_model(), lr=0.1, adamw_lr=0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {"muon": 0.05, "adamw": 0.1}


def test_one_cycle_turns_momentum_of_both_algorithms():
    model = nn.Linear(4, 4)
    optimizer = lm.Muon(model, lr=0.1)
    torch_adamw_bias = nn.Parameter(model.bias.detach().clone())
    reference = torch.optim.AdamW([torch_adamw_bias], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10, base_momentum=0.5, max_momentum=0.8)
        for opt in (optimizer, reference)
    ]
    seen = set()
    for step in range(9):
        model.weight.grad, model.bias.grad = torch.randn(4, 4), torch.randn(4) + step
        torch_adamw_bias.grad = model.bias.grad.clone()
        for opt, scheduler in zip((optimizer, reference), schedulers, strict=True):
            opt.step()
            scheduler.step()
        seen.add(round(optimizer.param_groups[0]["momentum"], 6))
        assert optimizer.param_groups[0]["momentum"] == optimizer.param_groups[1]["momentum"]
    assert min(seen) == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(model.bias, torch_adamw_bias, rtol=1e-6, atol=1e-7)


def test_add_param_group_routes_and_trains_the_new_ones():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = lm.Muon(first, lr=0.1)
    optimizer.add_param_group({"params": [(f"second.{n}", p) for n, p in second.named_parameters()], "lr": 0.3})
    assert [group["name"] for group in optimizer.param_groups] == ["muon", "adamw", "muon2", "adamw2"]
    assert optimizer.routes["second.weight"].algorithm == "muon"
    before = second.weight.detach().clone()
    second.weight.grad = torch.randn(4, 4)
    optimizer.step()
    assert not torch.equal(second.weight, before)


def test_groups_with_one_name_are_told_apart():
    pairs = [[(name, nn.Parameter(torch.zeros(2, 2)))] for name in ("x", "y", "z")]
    groups = [{"params": pair, "name": name} for pair, name in zip(pairs, ("a", "a2", "a"), strict=True)]
    assert [group["name"] for group in lm.Muon(groups).param_groups] == ["a", "a2", "a3"]


def test_a_refused_group_leaves_no_trace():
    optimizer = lm.Muon(nn.Linear(3, 3))
    late = [("late", nn.Parameter(torch.zeros(2, 2)))]
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": late, "lr": -1.0})
    optimizer.add_param_group({"params": late, "lr": 0.5})
    assert optimizer.param_groups[-1]["lr"] == 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"weight_decay": -0.1},
        {"momentum": 1.0},
        {"scale": "rms"},
        {"orthogonalization": "keller"},
        {"betas": (0.9, 1.0)},
        {"eps": -1.0},
        {"nonfinite": "ignore"},
    ],
)
def test_hyper_parameters_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"must be|not known"):
        lm.Muon(awkward_model(), **options)


def test_unknown_group_option_is_refused():
    with pytest.raises(ValueError, match="learning_rate"):
        lm.Muon([{"params": nn.Linear(3, 3).named_parameters(), "learning_rate": 0.1}])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_gradient_policy(bad):
    def poisoned(policy):
        model = awkward_model()
        optimizer = lm.Muon(model, lr=0.1, nonfinite=policy)
        train(optimizer, model)
        model.tall.weight.grad[3, 2] = bad
        state = copy.deepcopy(optimizer.state_dict()["state"])
        weights = {name: param.detach().clone() for name, param in model.named_parameters()}
        return model, optimizer, state, weights

    model, optimizer, state, weights = poisoned("raise")
    with pytest.raises(FloatingPointError, match=r"tall\.weight"):
        optimizer.step()
    assert_untouched(model, optimizer, state, weights)

    model, optimizer, state, weights = poisoned("skip")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not optimizer.update_records
    assert_untouched(model, optimizer, state, weights)

    model, optimizer, _, _ = poisoned("propagate")
    optimizer.step()
    assert model.tall.weight.isnan().all()


def assert_untouched(model, optimizer, state, weights):
    assert all(torch.equal(param, weights[name]) for name, param in model.named_parameters())
    for index, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[index][key]) for key, value in entries.items())


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = lm.Muon(embedding)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"'weight' has a sparse gradient"):
        optimizer.step()


def test_bfloat16_parameters_have_float32_momentum_and_torchs_adamw_state():
    model = awkward_model().to(torch.bfloat16)
    optimizer = lm.Muon(model)
    optimizer.step()
    assert optimizer.state[model.square.weight]["momentum_buffer"].dtype == torch.float32
    assert optimizer.state[model.norm.weight]["exp_avg"].dtype == torch.bfloat16


def test_learning_rate_monitor_finds_names_and_hyper_parameters(tmp_path):
    import lightning as L
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.loggers import CSVLogger

    from tests.lightning_runs import AwkwardLightningModule

    monitor = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        log_every_n_steps=1,
        logger=CSVLogger(tmp_path),
        callbacks=[monitor],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    trainer.fit(AwkwardLightningModule(lr=0.03, adamw_lr=0.04))
    assert {key: values[-1] for key, values in monitor.lrs.items()} == {"lr-Muon/muon": 0.03, "lr-Muon/adamw": 0.04}
    assert monitor.last_momentum_values == {"lr-Muon/muon-momentum": 0.95, "lr-Muon/adamw-momentum": 0.9}
    assert set(monitor.last_weight_decay_values.values()) == {0.1}
