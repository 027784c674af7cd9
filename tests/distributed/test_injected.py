"""The same gradients on every rank: then nothing is left that could differ but the sharding itself."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lightning_muon as lm
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM
from lightning_muon.sharding.zero1 import Zero1
from tests.models import awkward_model
from tests.processes import run_processes
from tests.references import relative_error
from tests.sharding import ShardedTraining, Training

SHAPES = {
    "square": (63, 63),
    "row": (1, 40),
    "column": (40, 1),
    "tall": (65, 17),
    "wide": (17, 130),
    "experts": (7, 12, 20),
    "vector": (129,),
}


def gradients(shapes, step):
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Injected(nn.Module):
    """The gradient of ``Σ p·g`` is ``g``."""

    def __init__(self, shapes):
        super().__init__()
        for name, weight in gradients(shapes, step=-1).items():
            setattr(self, name, nn.Parameter(weight))

    def forward(self, wanted):
        return sum((getattr(self, name) * gradient).sum() for name, gradient in wanted.items())


def run(shapes, sharded, options, steps=10, poisoned_rank=None):
    model = Injected(shapes)
    optimizer = lm.Muon(model, lr=0.02, adamw_lr=0.01, **options)
    training = ShardedTraining(model, optimizer, bucket_cap_mb=0.01) if sharded else Training(model, optimizer)
    error = None
    for step in range(steps):
        optimizer.zero_grad()
        wanted = gradients(shapes, step)
        if poisoned_rank is not None and step == 3 and dist.get_rank() == poisoned_rank:
            next(iter(wanted.values()))[0] = float("nan")
        training.backward(training(wanted))
        try:
            optimizer.step()
        except FloatingPointError as caught:
            error = str(caught)
            break
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    return weights, optimizer.local_state_bytes(), error, optimizer.skipped_steps


def one_matrix_per_shape(shapes):
    """Then the same matrices are batched, whoever owns them: each by itself."""
    return {name: shape for name, shape in shapes.items() if name != "experts"}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("orthogonalization", ["polar_express5", "keller5", "exact"])
def test_sharded_equals_unsharded(world_size, orthogonalization):
    options = {"orthogonalization": orthogonalization, "orthogonalization_dtype": torch.float32}
    expected, state_bytes, *_ = run(SHAPES, False, options)
    results = run_processes(world_size, run, SHAPES, True, options)
    for name, weight in expected.items():
        assert relative_error(results[0][0][name], weight) <= 1e-6, name
        assert all(torch.equal(result[0][name], results[0][0][name]) for result in results)
    assert sum(result[1] for result in results) == state_bytes


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"orthogonalization_dtype": torch.bfloat16}])
def test_bitwise_where_the_same_matrices_are_batched(world_size, options):
    shapes = one_matrix_per_shape(SHAPES)
    expected, *_ = run(shapes, False, options)
    for weights, *_ in run_processes(world_size, run, shapes, True, options):
        assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    "shapes", [{"only": (9, 9)}, {"vector": (5,)}, {"a": (3, 3), "b": (4, 5)}], ids=["one", "none", "two"]
)
def test_fewer_matrices_than_ranks(shapes):
    expected, *_ = run(shapes, False, {})
    for weights, *_ in run_processes(4, run, shapes, True, {}):
        for name, weight in expected.items():
            assert relative_error(weights[name], weight) <= 1e-6


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("poisoned_rank", [0, 1])
def test_a_nan_on_one_rank_stops_or_skips_all(policy, poisoned_rank):
    results = run_processes(2, run, SHAPES, True, {"nonfinite": policy}, 5, poisoned_rank)
    stopped_before, *_ = run(SHAPES, False, {}, steps=3)
    for weights, _, error, skipped in results:
        assert all(weight.isfinite().all() for weight in weights.values())
        assert torch.equal(weights["square"], results[0][0]["square"])
        if policy == "raise":
            assert "not finite" in error
            assert relative_error(weights["square"], stopped_before["square"]) <= 1e-6
        else:
            assert error is None
            assert skipped == 1
    if policy == "raise":
        assert any("square" in result[2] for result in results)


def step_without_synchronised_gradients():
    model = awkward_model()
    optimizer = lm.Muon(model)
    training = ShardedTraining(model, optimizer)
    with training.module.no_sync():
        training.backward(training(torch.zeros(2, 3, dtype=torch.int64)).sum())
    with pytest.raises(RuntimeError, match="not averaged"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="consolidate_state_dict"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match="add_param_group"):
        optimizer.add_param_group({"params": [("late", nn.Parameter(torch.zeros(2, 2)))]})


def parameter_without_optimizer():
    model = awkward_model()
    optimizer = lm.Muon([(n, p) for n, p in model.named_parameters() if n.startswith("square")])
    training = ShardedTraining(model, optimizer)
    with pytest.raises(RuntimeError, match="requires a gradient but belongs to no optimizer"):
        training.zero1.before_backward()


def ranks_that_disagree():
    model = nn.Linear(4, 4 + dist.get_rank())
    with pytest.raises(RuntimeError, match="disagree"):
        Zero1("test").adopt([lm.Muon(model)])


class _Named(nn.Module):
    """Parameters in the order in which they are given."""

    def __init__(self, names):
        super().__init__()
        for name in names:
            generator = torch.Generator().manual_seed(len(name))
            setattr(self, name, nn.Parameter(torch.randn(5, 6, generator=generator)))

    def forward(self, x):
        return sum((getattr(self, name) * x).square().sum() for name in sorted(vars(self)["_parameters"]))


def parameters_in_another_order():
    """As if from a set of names, whose order differs from process to process."""
    names = ["a", "bb", "ccc", "dddd", "eeeee"]
    model = _Named(names)
    pairs = list(model.named_parameters())
    optimizer = lm.Muon(pairs if dist.get_rank() == 0 else pairs[::-1], lr=0.1)
    single = _Named(names)
    reference = lm.Muon(single, lr=0.1)
    trainings = ShardedTraining(model, optimizer), Training(single, reference)
    for step in range(3):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        for training in trainings:
            training.optimizer.zero_grad()
            training.backward(training(x))
            training.optimizer.step()
    optimizer.consolidate_state_dict()
    for name, param in single.named_parameters():
        torch.testing.assert_close(getattr(model, name).detach(), param.detach(), rtol=1e-5, atol=1e-6)
    if dist.get_rank() == 0:
        reference.load_state_dict(optimizer.state_dict())


def policies_that_disagree():
    with pytest.raises(RuntimeError, match="nonfinite="):
        Zero1("test").adopt([lm.Muon(nn.Linear(3, 3), nonfinite="raise" if dist.get_rank() else "skip")])


def options_of_groups_that_disagree():
    with pytest.raises(RuntimeError, match=r"an option of a group .*'lr': '0\.[12]'"):
        Zero1("test").adopt([lm.Muon(nn.Linear(3, 3), lr=0.1 * (1 + dist.get_rank()))])


def sharded_pair():
    """Two modules with an optimizer each, under one reducer."""
    zero1, found = Zero1("test"), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = nn.Linear(4, 4)
        training = ShardedTraining(module, lm.Muon(module, lr=0.1), zero1)
        found.append((training.module, training.optimizer))
    return zero1, found


def backward(zero1, module):
    zero1.before_backward()
    module(torch.eye(4) * (1 + dist.get_rank())).square().sum().backward()
    zero1.after_backward()


def completeness_is_per_module():
    zero1, ((a, opt_a), (b, opt_b)) = sharded_pair()
    with b.no_sync():
        backward(zero1, b)
    backward(zero1, a)
    opt_a.step()  # complete
    with pytest.raises(RuntimeError, match="not averaged"):
        opt_b.step()
    backward(zero1, b)
    opt_b.step()
    with a.no_sync():
        backward(zero1, a)
    opt_b.step()


def gradients_of_another_module_stay():
    zero1, ((a, opt_a), (b, _)) = sharded_pair()
    backward(zero1, a)
    before = lm.grad_norm(opt_a)
    backward(zero1, b)
    torch.testing.assert_close(lm.grad_norm(opt_a), before)
    backward(zero1, a)
    torch.testing.assert_close(lm.grad_norm(opt_a), 2 * before)


def dropped_gradients_stay_dropped():
    for set_to_none in (True, False):
        zero1, ((a, opt_a), _) = sharded_pair()
        backward(zero1, a)
        expected = lm.grad_norm(opt_a)
        with a.no_sync():
            backward(zero1, a)
        opt_a.zero_grad(set_to_none)
        backward(zero1, a)
        torch.testing.assert_close(lm.grad_norm(opt_a), expected)


def raw_backward_twice():
    zero1, ((a, opt_a), _) = sharded_pair()
    zero1.before_backward()
    a(torch.eye(4)).sum().backward()
    opt_a.step()
    opt_a.zero_grad()
    a(torch.eye(4)).sum().backward()  # once a step is right
    with pytest.raises(RuntimeError, match=r"Call fabric\.backward"):
        a(torch.eye(4)).sum().backward()


def already_stepped():
    model = nn.Linear(4, 4)
    optimizer = lm.Muon(model)
    optimizer.state_dict()
    Zero1("test").adopt([optimizer])  # state that holds nothing yet is no obstacle
    optimizer = lm.Muon(model)
    model(torch.eye(4)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="before the strategy set it up"):
        Zero1("test").adopt([optimizer])


@pytest.mark.parametrize(
    "check",
    [
        step_without_synchronised_gradients,
        parameter_without_optimizer,
        ranks_that_disagree,
        policies_that_disagree,
        options_of_groups_that_disagree,
        already_stepped,
        raw_backward_twice,
        completeness_is_per_module,
    ],
)
def test_misuse_is_an_error_on_every_rank(check):
    run_processes(2, check)


@pytest.mark.parametrize(
    "check", [parameters_in_another_order, gradients_of_another_module_stay, dropped_gradients_stay_dropped]
)
def test_right_however_it_is_used(check):
    run_processes(2, check)


@pytest.mark.parametrize("world_size", [2, 4])
def test_state_of_real_ranks_is_balanced(world_size):
    held = run_processes(world_size, example_state_bytes)
    assert max(held) <= 1.15 * sum(held) / world_size
    assert sum(held) == lm.Muon(MoELM(ModelConfig())).local_state_bytes()


def example_state_bytes():
    model = MoELM(ModelConfig())
    zero1, optimizer = Zero1("test"), lm.Muon(model)
    zero1.adopt([optimizer])
    return optimizer.local_state_bytes()
