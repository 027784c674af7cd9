"""orthogonalization="auto" on several processes: owners look, all know, and nothing depends on who owns what."""

import pytest
import torch
import torch.distributed as dist

import lightning_muon as lm
from tests.distributed.test_injected import Injected
from tests.fsdp.layouts import adopt, fsdp, hsdp, shard_like, whole
from tests.processes import run_processes
from tests.references import relative_error
from tests.sharding import ShardedTraining, Training

EVERY = 6
SHAPES = {
    "square": (63, 63),
    "row": (1, 40),
    "tall": (65, 17),
    "wide": (17, 130),
    "steep": (30, 40),
    "experts": (5, 12, 20),
    "vector": (129,),
}
# how far the columns of a gradient fall off: the matrices need different numbers of steps
DECAY = {"square": 1e-2, "tall": 1.0, "wide": 1e-4, "steep": 1e-7, "experts": 0.3}


def auto_model(**options):
    model = Injected(SHAPES)
    return model, optimizer_of(model, **options)


def optimizer_of(model, **options):
    settings = {"orthogonalization": {"name": "auto", "every": EVERY}, "orthogonalization_dtype": torch.float32}
    return lm.Muon(model, lr=0.02, adamw_lr=0.01, **{**settings, **options})


def wanted_gradients(step):
    generator = torch.Generator().manual_seed(step)
    wanted = {}
    for name, shape in SHAPES.items():
        decay = torch.logspace(0, torch.log10(torch.tensor(DECAY.get(name, 1.0))).item(), shape[-1])
        wanted[name] = torch.randn(shape, generator=generator) * decay
    return wanted


def decaying_gradients(model, step):
    wanted = wanted_gradients(step)
    for name, param in model.named_parameters():
        param.grad = wanted[name].clone()
    return wanted


def zero1(state=None, first=0, steps=2 * EVERY + 2):
    model, optimizer = auto_model()
    training = ShardedTraining(model, optimizer) if dist.is_initialized() else Training(model, optimizer)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for step in range(first, steps):
        optimizer.zero_grad()
        training.backward(training(wanted_gradients(step)))
        optimizer.step()
    optimizer.consolidate_state_dict()
    counts = {name: list(found) for name, found in optimizer.step_counts.items()}
    optimizer_state = None if dist.is_initialized() and dist.get_rank() else optimizer.state_dict()
    return counts, {"model": model.state_dict(), "optimizer": optimizer_state}


def sharded(layout, steps=2 * EVERY + 2):
    model = Injected(SHAPES)
    layout(model)
    optimizer = optimizer_of(model)
    adopt(optimizer, model)
    for step in range(steps):
        wanted = wanted_gradients(step)
        for name, param in model.named_parameters():
            param.grad = shard_like(wanted[name], param)
        optimizer.step()
    return dict(optimizer.step_counts), {"model": {name: whole(param) for name, param in model.named_parameters()}}


def assert_equal(results, expected):
    counts, state = expected
    for found_counts, found in results:
        assert found_counts == counts
        for name, weight in state["model"].items():
            assert relative_error(found["model"][name], weight) <= 1e-5, name


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_zero1_equals_one_process(world_size):
    expected = zero1()
    assert len({count for counts in expected[0].values() for count in counts}) > 2, "all the same"
    results = run_processes(world_size, zero1)
    assert_equal(results, expected)
    assert results[0][1]["optimizer"]["lightning_muon"]["counts"] == expected[0]


@pytest.mark.parametrize(("layout", "world_size"), [(fsdp, 1), (fsdp, 2), (fsdp, 3), (hsdp, 4)])
def test_shards_equal_one_process(layout, world_size):
    assert_equal(run_processes(world_size, sharded, layout), zero1())


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 3), (3, 1), (1, 4)])
def test_resuming_on_other_processes(before, after):
    _, state = run_processes(before, zero1, None, 0, EVERY + 2)[0]
    results = run_processes(after, zero1, state, EVERY + 2)
    whole_run = run_processes(after, zero1)
    assert_equal(results, whole_run[0])
    if before == after:
        for (_, found), (_, expected) in zip(results, whole_run, strict=True):
            assert all(torch.equal(found["model"][name], weight) for name, weight in expected["model"].items())


def reordered():
    """One rank lists its parameters the other way round."""
    model = Injected(SHAPES)
    named = list(model.named_parameters())
    optimizer = lm.Muon(
        named[::-1] if dist.get_rank() else named,
        lr=0.02,
        adamw_lr=0.01,
        orthogonalization={"name": "auto", "every": EVERY},
        orthogonalization_dtype=torch.float32,
    )
    training = ShardedTraining(model, optimizer)
    for step in range(2 * EVERY + 2):
        optimizer.zero_grad()
        training.backward(training(wanted_gradients(step)))
        optimizer.step()
    optimizer.synchronize()
    return dict(optimizer.step_counts), {"model": model.state_dict()}


def test_the_order_of_the_parameters_does_not_matter():
    assert_equal(run_processes(2, reordered), zero1())
