"""``16-mixed``: an overflow at one rank only is skipped by all, and leaves no trace."""

from __future__ import annotations

from functools import partial

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.distributed.tensor import DTensor

import lightning_muon as lm
from lightning_muon.fabric import MuonFSDPStrategy, MuonZero1Strategy
from tests.lightning_runs import (
    GLOBAL_BATCH,
    AwkwardLightningModule,
    Loss,
    PoolEnvironment,
    replica_difference,
    trainer,
    weights,
)
from tests.models import awkward_model, token_batches
from tests.processes import run_processes

STEPS = 8
OVERFLOW_AT = 3
STRATEGIES = {
    "muon_zero1": (lm.MuonZero1Strategy, MuonZero1Strategy),
    "muon_fsdp": (
        partial(lm.MuonFSDPStrategy, wrap=(torch.nn.Linear,)),
        partial(MuonFSDPStrategy, wrap=(torch.nn.Linear,)),
    ),
}


def precision(plugin):
    return plugin("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))


def halve_scale(plugin):
    """All that an overflow leaves behind."""
    state = plugin.scaler.state_dict()
    plugin.scaler.load_state_dict({**state, "scale": state["scale"] / 2})


class Overflowing(AwkwardLightningModule):
    """At the given step, one rank's loss is infinite; the batches of the other steps are the same without it."""

    def __init__(self, overflow_at, overflow_rank):
        super().__init__()
        self.overflow_at, self.overflow_rank = overflow_at, overflow_rank
        self.snapshots = {}

    def on_train_batch_start(self, batch, batch_idx):
        if self.overflow_at is None and batch_idx == OVERFLOW_AT:
            halve_scale(self.trainer.precision_plugin)

    def training_step(self, batch, batch_idx):
        is_bad = batch_idx == self.overflow_at
        number = batch_idx - (self.overflow_at is not None and batch_idx > self.overflow_at)
        loss = self.model.loss(self._share(self.batches[number]))
        return loss * float("inf") if is_bad and self.global_rank == self.overflow_rank else loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        optimizer = self.trainer.optimizers[0]
        momentum = {
            name: local(optimizer.state[param]["momentum_buffer"]).clone()
            for name, param in optimizer.named_parameters()
            if "momentum_buffer" in optimizer.state[param]
        }
        self.snapshots[batch_idx] = (weights(self), momentum)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def through_trainer(strategy, overflow_at=None, overflow_rank=0, max_norm=None):
    module = Overflowing(overflow_at, overflow_rank)
    plugins = [PoolEnvironment(), precision(MixedPrecision)]
    batches = STEPS + (overflow_at is not None)
    options = {"limit_train_batches": batches, "max_epochs": 1, "gradient_clip_val": max_norm}
    run = trainer(-1, STRATEGIES[strategy][0](), plugins=plugins, **options)
    run.fit(module)
    assert module.replica_difference == 0
    if overflow_at is not None:
        before, after = module.snapshots[overflow_at - 1], module.snapshots[overflow_at]
        for kind in (0, 1):
            assert all(torch.equal(before[kind][name], after[kind][name]) for name in before[kind])
    return weights(module)


def through_fabric(strategy, overflow_at=None, overflow_rank=0, max_norm=None):
    plugins = [PoolEnvironment(), precision(FabricMixedPrecision)]
    strategy = STRATEGIES[strategy][1]()
    fabric = L.Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, plugins=plugins)
    fabric.launch()
    bare = Loss(awkward_model())
    options = {"lr": 1e-2, "adamw_lr": 5e-3, "orthogonalization_dtype": torch.float32}
    module, optimizer = fabric.setup(bare, lm.Muon(bare, **options))
    batches = [(tokens, False) for tokens in token_batches(20, GLOBAL_BATCH)[:STEPS]]
    if overflow_at is not None:
        batches.insert(overflow_at, (batches[0][0], True))
    for number, (tokens, is_bad) in enumerate(batches):
        if overflow_at is None and number == OVERFLOW_AT:
            halve_scale(fabric.strategy.precision)
        loss = module(tokens.chunk(fabric.world_size)[fabric.global_rank])
        fabric.backward(loss * float("inf") if is_bad and fabric.global_rank == overflow_rank else loss)
        if max_norm is not None:
            fabric.clip_gradients(module, optimizer, max_norm=max_norm)
        optimizer.step()
        optimizer.zero_grad()
        assert replica_difference(bare) == 0
    return weights(bare)


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("overflow_rank", [0, 2])
@pytest.mark.parametrize("run", [through_trainer, through_fabric])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_with_an_overflow_equals_one_that_never_saw_the_batch(strategy, run, overflow_rank, max_norm):
    untroubled = run_processes(3, run, strategy, None, 0, max_norm)
    troubled = run_processes(3, run, strategy, OVERFLOW_AT, overflow_rank, max_norm)
    for result in troubled:
        assert all(torch.equal(result[name], weight) for name, weight in untroubled[0].items())


class Unused(AwkwardLightningModule):
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Linear(3, 3)


def lacks_a_gradient():
    plugins = [PoolEnvironment(), precision(MixedPrecision)]
    with pytest.raises(RuntimeError, match=r"unused\.weight"):
        trainer(3, plugins=plugins).fit(Unused())


def test_a_rank_that_others_wait_for_says_so_before_the_scaler_asks():
    run_processes(2, lacks_a_gradient)


def scale_falls_everywhere(strategy):
    plugin = precision(MixedPrecision)
    module = Overflowing(1, 0)
    options = {"limit_train_batches": 3, "max_epochs": 1}
    run = trainer(-1, STRATEGIES[strategy][0](), plugins=[PoolEnvironment(), plugin], **options)
    run.fit(module)
    return plugin.scaler.get_scale()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_scale_falls_on_all_ranks(strategy):
    assert run_processes(2, scale_falls_everywhere, strategy) == [2.0**11] * 2


@pytest.mark.parametrize("number", [0, 1], ids=["trainer", "fabric"])
def test_lightning_does_not_take_the_name_of_the_precision_for_muon_fsdp(number):
    """What the strategies' documentation says, and when it can be forgotten."""
    host = (L.Trainer, L.Fabric)[number]
    with pytest.raises(ValueError, match=r"ModelParallelStrategy.*does not support.*16-mixed"):
        host(accelerator="cpu", devices=1, strategy=STRATEGIES["muon_fsdp"][number](), precision="16-mixed")
