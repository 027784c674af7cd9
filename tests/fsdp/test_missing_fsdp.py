"""Branches that some ranks do not take, under FSDP2."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lightning_muon.sharding.fsdp.missing import MissingFSDPGradients
from tests.processes import run_processes
from tests.references import relative_error
from tests.versions import needs_unused_parameters

NAMES = [f"layers.{index}.{branch}.{kind}" for index in (0, 1) for branch in "ab" for kind in ("weight", "bias")]
NAMES += ["stem.weight", "stem.bias", "never"]


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, uses_b):
        return x + self.a(x) + (self.b(x) if uses_b else 0)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Branches(), Branches()])
        self.stem, self.never = nn.Linear(3, 3), nn.Parameter(torch.ones(5))

    def forward(self, x, uses_b):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x, uses_b)
        return x.square().sum()

    def step(self, x, uses_b):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x, uses_b)
        return x.square().sum()


def data(rank, step):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * rank + step))


def gradients(policy, plans, precision, method, shape):
    """Gradients after each step. A step's plan says which ranks take the branch, for each of its backwards."""
    rank, model = dist.get_rank(), Network()
    options = {"mesh": init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])}
    if precision == "mixed":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "step")
    missing = MissingFSDPGradients(policy)
    missing.watch(model)
    names = {param: name for name, param in model.named_parameters()}
    steps = []
    for step, plan in enumerate(plans):
        for index, takers in enumerate(plan):
            model.set_requires_gradient_sync(index == len(plan) - 1)
            forward = model.step if method == "step" else model
            forward(data(rank, step), rank in takers).backward()
        try:
            missing.resolve(names)
            missing.resolve(names)
        except RuntimeError as error:
            steps.append(str(error))
        else:
            grads = {name: param.grad for param, name in names.items()}
            assert all(isinstance(grad, DTensor) for grad in grads.values() if grad is not None)
            steps.append({name: None if grad is None else grad.full_tensor() for name, grad in grads.items()})
        assert all(isinstance(param, DTensor) for param in model.parameters())
        for param in names:
            param.grad = None
        missing.forget(names)
    return steps


def expected_gradients(policy, plans, world_size):
    """All ranks' data in one process, by hand."""
    for step, plan in enumerate(plans):
        model = Network()
        counts = dict.fromkeys(NAMES, 0)
        total = dict.fromkeys(NAMES, 0)
        for rank in range(world_size):
            model.zero_grad()
            for takers in plan:
                model(data(rank, step), rank in takers).backward()
            for name, param in model.named_parameters():
                if param.grad is not None:
                    counts[name] += 1
                    total[name] = total[name] + param.grad / world_size
        for name, count in counts.items():
            if not count or (policy == "skip" and count < world_size):
                total[name] = None
        yield total


PLANS = [[{0}], [{0, 1}], [set()], [{1}, set()], [set(), {0}]]


@needs_unused_parameters
@pytest.mark.parametrize("policy", ["zero", "skip"])
@pytest.mark.parametrize(
    ("precision", "method", "shape"),
    [("full", "forward", (2,)), ("full", "step", (2,)), ("mixed", "forward", (2,)), ("full", "forward", (2, 2))],
    ids=str,
)
def test_zero_and_skip(policy, precision, method, shape):
    world_size = torch.Size(shape).numel()
    expected = list(expected_gradients(policy, PLANS, world_size))
    for steps in run_processes(world_size, gradients, policy, PLANS, precision, method, shape):
        for step, (grads, reference) in enumerate(zip(steps, expected, strict=True)):
            assert [name for name in NAMES if grads[name] is None] == [n for n in NAMES if reference[n] is None], step
            for name, grad in reference.items():
                if grad is not None:
                    assert relative_error(grads[name], grad) <= (0.02 if precision == "mixed" else 1e-5), name


@needs_unused_parameters
def test_raise():
    for steps in run_processes(2, gradients, "raise", PLANS, "full", "forward", (2,)):
        for step in (0, 3, 4):
            assert "layers.0.b.weight (on 1 of 2 ranks)" in steps[step]
            assert "missing_gradients='zero'" in steps[step]
            assert "never" not in steps[step]
            assert "layers.0.a.weight" not in steps[step]
        assert [name for name in NAMES if steps[1][name] is None] == ["never"]
        assert len([name for name in NAMES if steps[2][name] is None]) == 5


def test_no_policy_leaves_fsdp_alone():
    plans = [[{0, 1}], [set()]]
    expected = list(expected_gradients("zero", plans, 2))
    for steps in run_processes(2, gradients, None, plans, "full", "forward", (2,)):
        for grads, reference in zip(steps, expected, strict=True):
            assert [name for name in NAMES if grads[name] is None] == [n for n in NAMES if reference[n] is None]


def unfrozen():
    model = Network()
    model.layers[0].b.requires_grad_(False)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.layers[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    missing = MissingFSDPGradients("zero")
    missing.watch(model)
    names = {param: name for name, param in model.named_parameters()}
    found = []
    for _ in range(2):
        model(data(0, 0), True).backward()
        missing.resolve(names)
        found.append(model.layers[0].b.weight.grad is not None)
        missing.forget(names)
        model.layers[0].b.requires_grad_(True)
    return found


@needs_unused_parameters
def test_what_is_unfrozen_later_trains():
    assert run_processes(2, unfrozen) == [[False, True]] * 2


def test_an_old_torch_is_an_error(monkeypatch):
    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params", raising=False)
    with pytest.raises(RuntimeError, match=r"missing_gradients='zero' needs torch 2\.13"):
        MissingFSDPGradients("zero")
    assert MissingFSDPGradients(None).policy is None
