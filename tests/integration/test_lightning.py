"""Through the Trainer and through Fabric, sharded training is the training of one process."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging

import lightning_muon as lm
from tests.lightning_runs import GLOBAL_BATCH, AwkwardLightningModule, fabric_fit, fit, trainer, weights
from tests.models import awkward_model, token_batches
from tests.processes import run_processes
from tests.versions import EMAWeightAveraging, needs_moving_average

WORLD_SIZES = [1, 2, 3, 4]


def reference(steps=20, max_norm=None, clip_value=None, dtype=torch.float32):
    """One process, no Lightning."""
    model = torch.nn.ModuleDict({"model": awkward_model()}).to(dtype)
    optimizer = lm.Muon(model, lr=1e-2, adamw_lr=5e-3, orthogonalization_dtype=torch.float32)
    norms = []
    for tokens in token_batches(steps, GLOBAL_BATCH):
        optimizer.zero_grad()
        model["model"].loss(tokens).backward()
        if max_norm is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        if clip_value is not None:
            torch.nn.utils.clip_grad_value_(model.parameters(), clip_value)
        optimizer.step()
    return weights(model), norms, optimizer.local_state_bytes()


def assert_close(actual, expected, rtol=1e-5):
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        error = (actual[name] - weight).norm() / weight.norm()
        assert error <= rtol, f"{name}: {error:.2e} > {rtol:.0e}"


def assert_replicas_equal(results):
    for result in results[1:]:
        assert all(torch.equal(result[0][name], weight) for name, weight in results[0][0].items())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("run", [fit, fabric_fit])
def test_training_equals_one_process(run, world_size):
    expected, _, state_bytes = reference()
    results = run_processes(world_size, run)
    assert_replicas_equal(results)
    assert_close(results[0][0], expected)
    assert sum(result[2] for result in results) == state_bytes


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_the_big_batch(accumulate):
    # 12 sequences, 3 ranks, 4 micro-batches of one
    expected, *_ = reference(steps=10)
    results = run_processes(3, _fit_accumulating, accumulate)
    assert_close(results[0][0], expected)
    assert_close(run_processes(3, fabric_fit, 10, None, None, accumulate)[0][0], expected)


def _fit_accumulating(accumulate):
    return fit(10, accumulate_grad_batches=accumulate)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_clipping_norm_is_the_single_process_norm(world_size):
    expected, norms, _ = reference(steps=10, max_norm=0.05)
    for results in (
        run_processes(world_size, _fit_clipping, 0.05, "norm"),
        run_processes(world_size, fabric_fit, 10, None, None, 1, 0.05),
    ):
        assert_replicas_equal(results)
        assert_close(results[0][0], expected)
        for result in results:
            assert result[1][0] == pytest.approx(norms[0], rel=1e-6)  # later ones carry the weights' own rounding
            assert result[1] == pytest.approx(norms, rel=1e-5)


def test_clipping_by_value():
    expected, *_ = reference(steps=10, clip_value=1e-3)
    assert_close(run_processes(3, _fit_clipping, 1e-3, "value")[0][0], expected)


def _fit_clipping(value, algorithm):
    return fit(10, gradient_clip_val=value, gradient_clip_algorithm=algorithm)


@pytest.mark.parametrize(("run", "key"), [(fit, "state_dict"), (fabric_fit, "module")])
def test_resumes_on_any_number_of_processes(tmp_path, run, key):
    path = str(tmp_path / "step10.ckpt")
    uninterrupted = run_processes(2, run, 20)
    run_processes(2, run, 10, path)
    for world_size in WORLD_SIZES:
        resumed = run_processes(world_size, run, 20, None, path)
        assert_replicas_equal(resumed)
        if world_size == 2:
            assert all(torch.equal(resumed[0][0][n], weight) for n, weight in uninterrupted[0][0].items())
        assert_close(resumed[0][0], uninterrupted[0][0])
    saved = torch.load(path, weights_only=True)[key]
    assert len(saved) == len(uninterrupted[0][0])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("run", [fit, fabric_fit])
def test_bfloat16_moves_as_one_process_does(run, precision):
    results = run_processes(2, _with_precision, run, precision)
    assert_replicas_equal(results)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    expected, *_ = reference(steps=10, dtype=dtype)
    start = weights(torch.nn.ModuleDict({"model": awkward_model()}).to(dtype))
    moved = torch.cat([(results[0][0][name] - start[name]).flatten() for name in start])
    should = torch.cat([(expected[name] - start[name]).flatten() for name in start])
    # gradients of halves of the batch, rounded to 8 bits, turn small directions of the momentum elsewhere
    assert torch.nn.functional.cosine_similarity(moved, should, dim=0) > 0.9
    assert moved.norm() == pytest.approx(should.norm().item(), rel=0.05)


def _with_precision(run, precision):
    return run(10, precision=precision)


def test_validate_test_predict_and_go_on_fitting():
    expected, *_ = reference(steps=10)
    for result in run_processes(2, _everything):
        assert result["predictions"] == (GLOBAL_BATCH, 8)
        assert result["validated"] == pytest.approx(result["tested"])
        assert_close(result["five more by the same trainer"], expected)
        assert not result["other"].keys() - expected.keys()


def _everything():
    module = AwkwardLightningModule()
    run = trainer(5, limit_val_batches=1)
    run.fit(module)
    validated = run.validate(module, verbose=False)[0]["val_loss"]
    tested = run.test(module, verbose=False)[0]["val_loss"]
    predictions = run.predict(module)[0].shape
    # a new optimizer by configure_optimizers: the momentum goes on only through the checkpoint
    state = module.trainer.strategy.optimizer_state(run.optimizers[0])
    state = run.strategy.broadcast(state)
    run.fit_loop.epoch_loop.max_steps = 10
    module.on_fit_start = lambda: run.optimizers[0].load_state_dict(state)
    run.fit(module)
    del module.on_fit_start
    same = weights(module)
    other = trainer(12)
    other.fit(module)
    return {
        "validated": validated,
        "tested": tested,
        "predictions": tuple(predictions),
        "five more by the same trainer": same,
        "other": weights(module),
    }


class _CustomClipping(AwkwardLightningModule):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


def _averaged():
    module = AwkwardLightningModule()
    run = trainer(10, callbacks=[EMAWeightAveraging(decay=0.5)])
    run.fit(module)
    return weights(module)


def _stochastically_averaged():
    module = AwkwardLightningModule(num_steps=20)
    callback = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=1)
    run = trainer(-1, max_epochs=4, limit_train_batches=3, callbacks=[callback])
    run.fit(module)
    return weights(module)


def test_stochastic_weight_averaging_is_that_of_one_process():
    expected = run_processes(1, _stochastically_averaged)[0]
    for result in run_processes(2, _stochastically_averaged):
        assert_close(result, expected)


def _custom_clipping():
    module = _CustomClipping()
    trainer(10).fit(module)
    return (weights(module),)


def test_own_clipping_hook_clips_the_whole_gradient():
    expected, *_ = reference(steps=10, max_norm=0.05)
    assert_close(run_processes(2, _custom_clipping)[0][0], expected)


@needs_moving_average
def test_moving_average_of_weights_is_that_of_one_process():
    results = run_processes(2, _averaged)
    model, average = torch.nn.ModuleDict({"model": awkward_model()}), None
    optimizer = lm.Muon(model, lr=1e-2, adamw_lr=5e-3, orthogonalization_dtype=torch.float32)
    for tokens in token_batches(10, GLOBAL_BATCH):
        optimizer.zero_grad()
        model["model"].loss(tokens).backward()
        optimizer.step()
        now = weights(model)
        average = now if average is None else {name: 0.5 * average[name] + 0.5 * now[name] for name in now}
    for result in results:
        assert_close(result, average)
