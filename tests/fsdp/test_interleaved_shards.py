"""Matrices that lie in turn, where shards begin and end within a run: as one process trains and measures them."""

import pytest
import torch

import lightning_muon as lm
from tests.distributed.test_injected import Injected, gradients, run
from tests.fsdp.layouts import adopt, copies_agree, fsdp, hsdp, shard_like, whole
from tests.processes import run_processes
from tests.references import relative_error

SHAPES = {
    "heads": (24, 10),  # 4 heads of 2 rows each of q, k, v
    "groups": (28, 6),  # 2 groups of 4 q, 1 k, 1 v of 2 rows each, and 2 rows more each
    "columns": (5, 6, 8),
    "experts": (3, 12, 7),
    "plain": (9, 12),
    "vector": (13,),
}
RULES = [
    lm.Rule("heads", split_sizes=(8, 8, 8), interleaved=4),
    lm.Rule("groups", split_sizes=(16, 4, 4, 4), interleaved=2),
    lm.Rule("columns", split_sizes=(4, 4), transposed=True, interleaved=4),
    lm.Rule("experts", split_sizes=(8, 4), interleaved=2),
]
OPTIONS = {"rules": RULES, "orthogonalization_dtype": torch.float32, "scale": "spectral"}


def train(layout, steps=6):
    """The weights after some steps, and whether a process sees each matrix as one process would."""
    model = Injected(SHAPES)
    if layout is not None:
        layout(model)
    optimizer = lm.Muon(model, lr=0.02, adamw_lr=0.01, **OPTIONS)
    if layout is not None:
        adopt(optimizer, model)
    for step in range(steps):
        wanted = gradients(SHAPES, step)
        for name, param in model.named_parameters():
            param.grad = shard_like(wanted[name], param)
        optimizer.step()
        assert all(copies_agree(param) for param in model.parameters())
    weights = {name: whole(param) for name, param in model.named_parameters()}
    layouts = {name: r.layout for name, r in optimizer.routes.items() if r.algorithm == "muon"}
    params = dict(model.named_parameters())
    dealt = optimizer.partition.deal({name: (params[name], layout) for name, layout in layouts.items()})
    seen = [
        (name, number, torch.equal(matrix, layouts[name].matrices(weights[name])[number]))
        for (name, number), matrix in dealt
    ]
    return weights, seen


@pytest.mark.parametrize(("layout", "world_size"), [(fsdp, 1), (fsdp, 2), (fsdp, 3), (fsdp, 4), (hsdp, 4)])
def test_shards_train_as_one_process(layout, world_size):
    expected, seen_alone = train(None)
    results = run_processes(world_size, train, layout)
    for weights, _ in results:
        for name, weight in expected.items():
            assert relative_error(weights[name], weight) <= 1e-6, name
    assert sorted(one for _, seen in results for one in seen) == sorted(seen_alone)
    assert all(is_equal for *_, is_equal in seen_alone)


@pytest.mark.parametrize("world_size", [2, 3])
def test_owners_train_as_one_process(world_size):
    expected = run(SHAPES, False, OPTIONS)[0]
    for result in run_processes(world_size, run, SHAPES, True, OPTIONS):
        for name, weight in expected.items():
            assert relative_error(result[0][name], weight) <= 1e-6, name
