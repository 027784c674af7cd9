"""``muon_fsdp`` through the Trainer and Fabric: branches that not all ranks take, bad gradients, compiled blocks."""

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import nn

import lightning_muon as lm
from lightning_muon.fabric import MuonFSDPStrategy as FabricFSDP
from tests.integration.test_lightning import assert_close, reference
from tests.lightning_runs import GLOBAL_BATCH, AwkwardLightningModule, PoolEnvironment, trainer, weights
from tests.models import awkward_model, token_batches
from tests.processes import run_processes
from tests.versions import needs_unused_parameters

OPTIONS = {"lr": 1e-2, "adamw_lr": 5e-3, "orthogonalization_dtype": torch.float32}
# of each step, the ranks that take the branch
PLAN = [{0}, {0, 1, 2}, set(), {1, 2}, {2}]
STEPS = len(PLAN)


class Branches(nn.Module):
    """A model with a part that it need not use."""

    def __init__(self):
        super().__init__()
        self.model = awkward_model()
        self.extra = nn.Linear(5, 3)

    def forward(self, tokens, takes):
        loss = self.model.loss(tokens)
        return loss + self.extra(torch.ones(5)).square().mean() if takes else loss


class Module(AwkwardLightningModule):
    """The loss of ``Branches``, infinite on some ranks in some steps."""

    def __init__(self, plan=PLAN, bad=(), **options):
        super().__init__(STEPS, **options)
        self.branches, self.plan, self.bad, self.history = Branches(), plan, bad, []
        del self.model

    def training_step(self, batch, batch_idx):
        loss = self.branches(self._share(self.batches[batch_idx]), self.global_rank in self.plan[batch_idx])
        return loss * float("inf") if (batch_idx, self.global_rank) in self.bad else loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.history.append(weights(self))


def through_trainer(strategy_options, plan=PLAN, bad=(), **muon_options):
    """Weights after each step."""
    module = Module(plan, bad, **muon_options)
    run = trainer(STEPS, lm.MuonFSDPStrategy(**strategy_options), limit_train_batches=STEPS)
    run.fit(module)
    return [{name.removeprefix("branches."): weight for name, weight in step.items()} for step in module.history]


def through_fabric(strategy_options, plan=PLAN, bad=(), **muon_options):
    options = {"accelerator": "cpu", "devices": dist.get_world_size(), "plugins": [PoolEnvironment()]}
    fabric = L.Fabric(strategy=FabricFSDP(**strategy_options), **options)
    fabric.launch()
    bare = Branches()
    module, optimizer = fabric.setup(bare, lm.Muon(bare, **{**OPTIONS, **muon_options}))
    history = []
    for number, tokens in enumerate(token_batches(STEPS, GLOBAL_BATCH)):
        loss = module(tokens.chunk(fabric.world_size)[fabric.global_rank], fabric.global_rank in plan[number])
        fabric.backward(loss * float("inf") if (number, fabric.global_rank) in bad else loss)
        optimizer.step()
        optimizer.zero_grad()
        history.append(weights(bare))
    return history


def run(how, *args, **options):
    return how(*args, **options)


def by_hand(world_size, policy):
    """All ranks' shares in one process."""
    model = Branches()
    optimizer = lm.Muon(model, **OPTIONS)
    history = []
    for tokens, takers in zip(token_batches(STEPS, GLOBAL_BATCH), PLAN, strict=True):
        optimizer.zero_grad()
        takers = takers & set(range(world_size))
        for rank, share in enumerate(tokens.chunk(world_size)):
            (model(share, rank in takers) / world_size).backward()
        if policy == "skip" and len(takers) < world_size:
            model.extra.zero_grad()
        optimizer.step()
        history.append(weights(model))
    return history


@needs_unused_parameters
@pytest.mark.parametrize("policy", ["zero", "skip"])
@pytest.mark.parametrize("how", [through_trainer, through_fabric])
def test_branches_that_some_ranks_do_not_take(how, policy):
    expected = by_hand(3, policy)
    for history in run_processes(3, run, how, {"missing_gradients": policy}):
        for found, step in zip(history, expected, strict=True):
            assert_close(found, step)


def complains(how):
    with pytest.raises(RuntimeError) as raised:
        how({})
    return str(raised.value)


@needs_unused_parameters
@pytest.mark.parametrize("how", [through_trainer, through_fabric])
def test_by_default_they_are_an_error_on_every_rank(how):
    for text in run_processes(3, complains, how):
        assert "extra.weight (on 1 of 3 ranks)" in text
        assert "extra.bias" in text
        assert "missing_gradients='zero'" in text
        assert "model." not in text


EVERYWHERE = [{0, 1, 2}] * STEPS
BAD_STEP = 2


def bad_gradients(how, policy, bad_rank):
    return how({}, EVERYWHERE, {(BAD_STEP, bad_rank)}, nonfinite=policy)


@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize("how", [through_trainer, through_fabric])
def test_a_bad_gradient_of_one_rank_is_skipped_by_all(how, bad_rank):
    good = run_processes(2, run, how, {}, EVERYWHERE)[0]
    for history in run_processes(2, bad_gradients, how, "skip", bad_rank):
        for step in range(BAD_STEP):
            assert all(torch.equal(history[step][name], weight) for name, weight in good[step].items())
        before, after, later = history[BAD_STEP - 1 : BAD_STEP + 2]
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
        assert all(weight.isfinite().all() for weight in later.values())
        assert not any(torch.equal(later[name], weight) for name, weight in after.items())


def raises(how, bad_rank):
    with pytest.raises(FloatingPointError) as raised:
        bad_gradients(how, "raise", bad_rank)
    return str(raised.value)


@pytest.mark.parametrize("how", [through_trainer, through_fabric])
def test_a_bad_gradient_of_one_rank_is_an_error_on_all(how):
    for text in run_processes(2, raises, how, 1):
        assert "Gradients that are not finite, in " in text
        assert "model.square.weight" in text


@pytest.mark.parametrize("how", [through_trainer, through_fabric])
def test_a_bad_gradient_is_passed_on_if_wanted(how):
    for history in run_processes(2, bad_gradients, how, "propagate", 1):
        assert all(weight.isfinite().all() for weight in history[BAD_STEP - 1].values())
        assert all(not weight.isfinite().all() for weight in history[BAD_STEP].values())


class Block(nn.Linear):
    """Of torch's own modules nothing is compiled in place: torch skips their code where hooks break the graph."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class Compiled(AwkwardLightningModule):
    """Compiles its blocks itself, and leaves it to the strategy to shard them."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.model.square.__class__ = self.model.wide.__class__ = Block

    def configure_model(self):
        if hasattr(self, "compiled"):
            return
        self.compiled = True
        for name in ("square", "wide"):
            if self.in_place:
                getattr(self.model, name).compile(backend="aot_eager")
            else:
                setattr(self.model, name, torch.compile(getattr(self.model, name), backend="aot_eager"))


def compiled_blocks(in_place):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = Compiled(in_place)
    trainer(20, strategy=lm.MuonFSDPStrategy(wrap=(nn.Linear, nn.Conv1d))).fit(module)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"], weights(module)


@pytest.mark.parametrize("in_place", [True, False])
def test_blocks_compiled_in_configure_model(in_place):
    expected, *_ = reference()
    for graphs, found in run_processes(2, compiled_blocks, in_place):
        assert graphs > 0
        assert_close({name.replace("_orig_mod.", ""): weight for name, weight in found.items()}, expected)
