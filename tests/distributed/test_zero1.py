"""Sharded equals unsharded, through Fabric's strategy on real processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import lightning_muon as lm
from lightning_muon.sharding.clipping import clip_grad_norm_
from tests.models import awkward_model, token_batches
from tests.processes import run_processes
from tests.sharding import ShardedTraining

STEPS = 20
GLOBAL_BATCH = 12


def _optimizer(model, **kwargs):
    return lm.Muon(model, lr=1e-2, adamw_lr=5e-3, orthogonalization_dtype=torch.float32, **kwargs)


def _weights(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def train_single(steps=STEPS, max_norm=None, dtype=torch.float32, **kwargs):
    model = awkward_model().to(dtype)
    optimizer = _optimizer(model, **kwargs)
    norms = []
    for batch in token_batches(steps, GLOBAL_BATCH):
        optimizer.zero_grad()
        model.loss(batch).backward()
        if max_norm is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
        optimizer.step()
    return _weights(model), optimizer.state_dict(), norms


def _replica_difference(model):
    """The largest difference of any weight to rank 0's."""
    worst = 0.0
    for param in model.parameters():
        reference = param.detach().clone()
        dist.broadcast(reference, 0)
        worst = max(worst, (reference - param).abs().max().item())
    return worst


class _Loss(torch.nn.Module):
    """DDP's hooks run on forward(), so the loss is one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model.loss(tokens)


def train_sharded(steps=STEPS, accumulate=1, use_no_sync=True, max_norm=None, dtype=torch.float32, kwargs=None):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = awkward_model(seed=rank).to(dtype)  # different on purpose: DDP starts everyone from rank 0's
    optimizer = _optimizer(model, **(kwargs or {}))
    training = ShardedTraining(_Loss(model), optimizer, bucket_cap_mb=0.004)  # several buckets
    norms, differences = [], []
    for batch in token_batches(steps, GLOBAL_BATCH):
        optimizer.zero_grad()
        micro_batches = batch.chunk(world_size)[rank].chunk(accumulate)
        for number, micro_batch in enumerate(micro_batches, start=1):
            training.module.require_backward_grad_sync = not use_no_sync or number == len(micro_batches)
            training.backward(training(micro_batch) / len(micro_batches))
        if max_norm is not None:
            norms.append(clip_grad_norm_(optimizer, max_norm))
        optimizer.step()
        differences.append(_replica_difference(model))
    optimizer.consolidate_state_dict()
    state = optimizer.state_dict() if rank == 0 else None
    return _weights(model), state, norms, max(differences), optimizer.local_state_bytes()


def assert_weights_close(actual, expected, rtol):
    for name, weight in expected.items():
        error = (actual[name].double() - weight.double()).norm() / weight.double().norm().clamp_min(1e-12)
        assert error <= rtol, f"{name}: {error:.2e} > {rtol:.0e}"


def assert_states_close(actual, expected, rtol):
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for index, entries in expected["state"].items():
        for key, value in entries.items():
            found = actual["state"][index][key]
            assert found.shape == value.shape
            assert found.dtype == value.dtype
            torch.testing.assert_close(found, value, rtol=rtol, atol=rtol * value.abs().max().item())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_training_equals_one_process(world_size):
    weights, state, _ = train_single()
    results = run_processes(world_size, train_sharded)
    for sharded_weights, _, _, difference, _ in results:
        assert_weights_close(sharded_weights, weights, rtol=1e-5)
        assert difference == 0, "replicas differ"
    assert_states_close(results[0][1], state, rtol=1e-4)
    total = sum(result[4] for result in results)
    assert total == lm_state_bytes()


def lm_state_bytes():
    return _optimizer(awkward_model()).local_state_bytes()


@pytest.mark.parametrize(("accumulate", "use_no_sync"), [(2, True), (3, True), (3, False)])
def test_accumulation_equals_the_big_batch(accumulate, use_no_sync):
    weights, _, _ = train_single(steps=10)
    results = run_processes(2, train_sharded, 10, accumulate, use_no_sync)
    for sharded_weights, *_ in results:
        assert_weights_close(sharded_weights, weights, rtol=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_clipping_uses_the_norm_of_the_whole_gradient(world_size):
    weights, _, norms = train_single(steps=10, max_norm=0.05)
    for sharded_weights, _, sharded_norms, _, _ in run_processes(world_size, train_sharded, 10, 1, True, 0.05):
        torch.testing.assert_close(torch.stack(sharded_norms), torch.stack(norms), rtol=1e-5, atol=0)
        assert sharded_norms[0].item() == pytest.approx(norms[0].item(), rel=1e-6)
        assert_weights_close(sharded_weights, weights, rtol=1e-5)
