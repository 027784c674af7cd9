"""The same gradients, whole or in shards: then nothing is left that could differ but the exchange itself."""

import pytest
import torch

import lightning_muon as lm
from tests.distributed.test_injected import SHAPES, Injected, gradients, one_matrix_per_shape
from tests.fsdp.layouts import adopt, copies_agree, fsdp, hsdp, shard_like, whole
from tests.processes import run_processes
from tests.references import relative_error

# 3 experts on 4 ranks, 5 rows on 4 ranks (2, 2, 1, 0), 3 on 4, and a convolution with groups
MORE = {"stack": (3, 6, 10), "five": (5, 12), "three": (3, 70), "conv": (6, 4, 3), "heads": (12, 8), "split": (15, 9)}
GROUPS = {"heads": {"num_heads": 3}, "split": {"split_sizes": (4, 11)}, "stack": {}, "conv": {}}


def groups_of(model):
    named = dict(model.named_parameters())
    names = [name for name in GROUPS if name in named]
    special = [{"params": [(name, named.pop(name))], "algorithm": "muon", **GROUPS[name]} for name in names]
    return [{"params": list(named.items())}, *special]


def train(shapes, layout, options, steps=10, exchange=None):
    model = Injected(shapes)
    if layout is not None:
        layout(model)
    optimizer = lm.Muon(groups_of(model), lr=0.02, adamw_lr=0.01, **options)
    if layout is not None:
        adopt(optimizer, model, **(exchange or {}))
    for step in range(steps):
        wanted = gradients(shapes, step)
        for name, param in model.named_parameters():
            param.grad = shard_like(wanted[name], param)
        optimizer.step()
        assert all(copies_agree(param) for param in model.parameters()), f"replicas differ after step {step}"
    return {name: whole(param) for name, param in model.named_parameters()}, optimizer.local_state_bytes()


@pytest.mark.parametrize(("layout", "world_size"), [(fsdp, 1), (fsdp, 2), (fsdp, 3), (fsdp, 4), (hsdp, 2), (hsdp, 4)])
@pytest.mark.parametrize(
    "options", [{}, {"orthogonalization": "exact", "scale": "spectral"}, {"nesterov": False, "maximize": True}]
)
def test_sharded_equals_unsharded(layout, world_size, options):
    options = {"orthogonalization_dtype": torch.float32, **options}
    shapes = {**SHAPES, **MORE}
    expected, _ = train(shapes, None, options)
    for weights, _ in run_processes(world_size, train, shapes, layout, options):
        for name, weight in expected.items():
            assert relative_error(weights[name], weight) <= 1e-6, name


@pytest.mark.parametrize(("layout", "world_size"), [(fsdp, 2), (fsdp, 4), (hsdp, 4)])
def test_bitwise_where_the_same_matrices_are_batched(layout, world_size):
    shapes = one_matrix_per_shape(SHAPES)
    expected, _ = train(shapes, None, {})
    for weights, _ in run_processes(world_size, train, shapes, layout, {}):
        assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    "shapes", [{"only": (9, 9)}, {"vector": (5,)}, {"a": (3, 3), "b": (4, 5)}], ids=["one", "none", "two"]
)
def test_fewer_matrices_than_ranks(shapes):
    expected, _ = train(shapes, None, {})
    for weights, _ in run_processes(4, train, shapes, fsdp, {}):
        for name, weight in expected.items():
            assert relative_error(weights[name], weight) <= 1e-6


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_shards_of_the_state_are_one_state(world_size):
    shapes = {**SHAPES, **MORE}
    _, alone = train(shapes, None, {})
    assert sum(size for _, size in run_processes(world_size, train, shapes, fsdp, {})) == alone


@pytest.mark.parametrize(("layout", "world_size"), [(fsdp, 2), (hsdp, 4)])
def test_bfloat16_on_the_way(layout, world_size):
    """What travels is rounded once each way, of values of about the size of the update; copies are rounded alike."""
    expected, _ = train(SHAPES, None, {}, steps=3)
    for weights, _ in run_processes(world_size, train, SHAPES, layout, {}, 3, {"exchange_dtype": torch.bfloat16}):
        errors = {name: relative_error(weights[name], weight) for name, weight in expected.items()}
        assert max(errors.values()) <= 1e-2
        assert errors["square"] > 1e-6, "nothing was rounded"
        assert errors["vector"] <= 1e-6
