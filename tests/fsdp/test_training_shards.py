"""Twenty real steps of a sharded module equal one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, silu

import lightning_muon as lm
from lightning_muon.monitoring.collect import FAMILIES, Request, collect
from lightning_muon.sharding.clipping import clip_grad_norm_
from tests.fsdp.layouts import adopt, copies_agree, fsdp, hsdp, tensor_parallel, whole
from tests.models import awkward_model, token_batches
from tests.processes import run_processes
from tests.references import relative_error

STEPS = 20
UNITS = ("square", "wide", "conv")


class Pair(nn.Module):
    """Two layers that tensor parallelism splits, 9 columns to each rank; 9 rows are shared as 5 and 4."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(17, 12)
        self.norm = nn.LayerNorm(12)
        self.tall = nn.Linear(12, 18)
        self.wide = nn.Linear(18, 12, bias=False)
        self.square = nn.Linear(12, 12, bias=False)
        self.lm_head = nn.Linear(12, 17)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        x = x + self.wide(silu(self.tall(self.norm(x))))
        return self.lm_head(self.square(x))

    def loss(self, tokens):
        return cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def pair(seed=0):
    torch.manual_seed(seed)
    return Pair()


def train(
    build, layout=None, steps=STEPS, accumulate=1, max_norm=None, scope="all", units=(), muon=None, exchange=None
):
    model = build()
    rank, size = 0, 1
    if layout is not None:
        layout(model, units)
        rank, size = dist.get_rank(), dist.get_world_size()
        if layout is tensor_parallel:
            rank, size = rank // 2, size // 2
    optimizer = lm.Muon(model, lr=1e-2, adamw_lr=5e-3, orthogonalization_dtype=torch.float32, **(muon or {}))
    if layout is not None:
        adopt(optimizer, model, **(exchange or {}))
    norms = []
    for batch in token_batches(steps, 12):
        optimizer.zero_grad()
        micro_batches = batch.chunk(size)[rank].chunk(accumulate)
        for number, micro_batch in enumerate(micro_batches, start=1):
            if layout is not None:
                model.set_requires_gradient_sync(number == len(micro_batches))
            (model.loss(micro_batch) / len(micro_batches)).backward()
        if max_norm is not None:
            clip_grad_norm_(optimizer, max_norm, scope=scope)
            norms.append({key: value.item() for key, value in optimizer.last_grad_norms.items()})
        optimizer.step()
        assert all(copies_agree(param) for param in model.parameters())
    state = {
        name: whole(optimizer.state[param]["momentum_buffer"])
        for name, param in optimizer.named_parameters()
        if "momentum_buffer" in optimizer.state[param]
    }
    return {name: whole(param) for name, param in model.named_parameters()}, state, norms


def assert_close(results, expected, rtol=1e-5):
    weights, state, norms = expected
    for actual_weights, actual_state, actual_norms in results:
        for name, weight in weights.items():
            assert relative_error(actual_weights[name], weight) <= rtol, name
        for name, momentum in state.items():
            assert relative_error(actual_state[name], momentum) <= 10 * rtol, name
        for actual, wanted in zip(actual_norms, norms, strict=True):
            for key, value in wanted.items():
                assert actual[key] == pytest.approx(value, rel=rtol), key


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("units", [(), UNITS])
def test_fsdp(world_size, units):
    results = run_processes(world_size, train, awkward_model, fsdp, STEPS, 1, None, "all", units)
    assert_close(results, train(awkward_model))


@pytest.mark.parametrize("world_size", [2, 4])
def test_hsdp(world_size):
    results = run_processes(world_size, train, awkward_model, hsdp, STEPS, 1, None, "all", UNITS)
    assert_close(results, train(awkward_model))


@pytest.mark.parametrize("world_size", [2, 4])
def test_tensor_parallelism(world_size):
    results = run_processes(world_size, train, pair, tensor_parallel, STEPS, 1, 0.05)
    assert_close(results, train(pair, max_norm=0.05))


@pytest.mark.parametrize(("layout", "world_size"), [(fsdp, 1), (fsdp, 3), (hsdp, 4)])
@pytest.mark.parametrize("scope", ["all", "adamw"])
def test_clipping_uses_the_norm_of_the_whole_gradient(layout, world_size, scope):
    results = run_processes(world_size, train, awkward_model, layout, 10, 1, 0.05, scope, UNITS)
    assert_close(results, train(awkward_model, steps=10, max_norm=0.05, scope=scope))


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulation_equals_the_big_batch(accumulate):
    results = run_processes(2, train, awkward_model, fsdp, 10, accumulate, None, "all", UNITS)
    assert_close(results, train(awkward_model, steps=10))


@pytest.mark.parametrize("idle_matrices", ["skip", "update"])
def test_policies_on_idle_matrices(idle_matrices):
    muon = {"idle_matrices": idle_matrices}
    results = run_processes(3, train, awkward_model, fsdp, 10, 1, None, "all", (), muon)
    assert_close(results, train(awkward_model, steps=10, muon=muon))


def measured(build, layout=None):
    model = build()
    if layout is not None:
        layout(model, ())
    optimizer = lm.Muon(model, lr=1e-2, orthogonalization_dtype=torch.float32)
    if layout is not None:
        adopt(optimizer, model, exchange_dtype=torch.bfloat16)
    for batch in token_batches(2, 12):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
    requests = [Request(tuple(FAMILIES)), Request(("weight_spectral_norm",), include="square", mode="detailed")]
    return collect([optimizer], requests).values


@pytest.mark.parametrize(("layout", "world_size"), [(fsdp, 3), (hsdp, 4), (tensor_parallel, 4)])
def test_monitors_measure_what_one_process_would(layout, world_size):
    """All processes see the same batch. Updates travel in 16 bits here; weights, to be measured, must not."""
    expected = measured(pair)
    for values in run_processes(world_size, measured, pair, layout):
        assert values.keys() == expected.keys()
        for key, value in expected.items():
            assert values[key] == pytest.approx(value, rel=1e-2 if "update" in key else 2e-3, abs=1e-6), key


def spectra_of_the_first_weights(layout=None):
    model = pair()
    if layout is not None:
        layout(model, ())
    optimizer = lm.Muon(model)
    if layout is not None:
        adopt(optimizer, model, exchange_dtype=torch.bfloat16)
    return collect([optimizer], [Request(("weight_svd_entropy", "weight_rms"))]).values


@pytest.mark.parametrize("layout", [fsdp, hsdp])
def test_weights_are_measured_as_they_are(layout):
    expected = spectra_of_the_first_weights()
    for values in run_processes(4, spectra_of_the_first_weights, layout):
        for key, value in expected.items():
            assert values[key] == pytest.approx(value, rel=1e-6), key
