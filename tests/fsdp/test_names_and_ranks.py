"""Checkpoints of compiled modules, and processes that do not see or do the same."""

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import nn

import lightning_muon as lm
from lightning_muon.fabric import MuonFSDPStrategy as FabricFSDP
from lightning_muon.sharding.fsdp import shard_optimizer
from tests.fsdp.layouts import adopt, fsdp, whole
from tests.fsdp.resume_matrix import BLOCKS, SAVED_AT, Layout, distance, run
from tests.fsdp.test_strategy_checkpoints import resume
from tests.lightning_runs import AwkwardLightningModule, Loss, PoolEnvironment, trainer, weights
from tests.models import awkward_model, token_batches
from tests.processes import run_processes


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Blocks(L.LightningModule):
    def __init__(self, compiled, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        blocks = [Block(), Block()]
        self.layers = nn.Sequential(*(torch.compile(b, backend="eager") if compiled else b for b in blocks))

    def training_step(self, batch, batch_idx):
        return self.layers(batch).square().mean()

    def configure_optimizers(self):
        return lm.Muon(self, lr=1e-2, orthogonalization_dtype=torch.float32)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(8, 2, 6), batch_size=None)


def save_blocks(strategy, compiled, path, folder):
    module = Blocks(compiled)
    options = {"save_distributed_checkpoint": folder}
    run = trainer(2, strategy=lm.MuonFSDPStrategy(**options) if strategy == "muon_fsdp" else strategy)
    run.fit(module)
    run.save_checkpoint(path)
    return weights(module)


def load_blocks(strategy, compiled, path):
    module = Blocks(compiled, seed=1)
    before = weights(module)
    trainer(2, strategy=strategy).fit(module, ckpt_path=path)  # nothing is left to train
    return weights(module), before


def bare(named):
    return {name.replace("_orig_mod.", ""): value for name, value in named.items()}


@pytest.mark.parametrize(
    ("source", "folder"), [("muon_zero1", False), ("muon_fsdp", False), ("muon_fsdp", True)], ids=str
)
@pytest.mark.parametrize("compiled", [(True, True), (True, False), (False, True)], ids=str)
def test_compiled_blocks(tmp_path, source, folder, compiled):
    path = str(tmp_path / "blocks.ckpt")
    saved = bare(run_processes(2, save_blocks, source, compiled[0], path, folder)[0])
    for loaded, before in run_processes(2, load_blocks, "muon_fsdp", compiled[1], path):
        assert distance(bare(loaded), saved) == 0
        assert distance(bare(before), saved) > 0


def resume_where_only_rank_0_sees_it(path):
    module = AwkwardLightningModule(seed=3)
    before = weights(module)
    path = path if dist.get_rank() == 0 else path + ".elsewhere"
    strategy = lm.MuonFSDPStrategy(wrap=BLOCKS)
    strategy.broadcast = lambda value, src=0: path if str(value).endswith(".ckpt") else value
    with pytest.raises(lm.CheckpointError):
        trainer(SAVED_AT + 1, strategy=strategy).fit(module, ckpt_path=path + (".ckpt" if dist.get_rank() else ""))
    return distance(weights(module), before)


@pytest.mark.parametrize("folder", [False, True])
def test_a_checkpoint_that_only_some_processes_see(tmp_path, folder):
    path = str(tmp_path / "model.ckpt")
    run(Layout("saved", 2, folder=folder), save_to=path)
    assert run_processes(2, resume_where_only_rank_0_sees_it, path) == [0.0, 0.0]


def shards_elsewhere():
    module = AwkwardLightningModule()
    run = trainer(1, strategy=lm.MuonFSDPStrategy(save_distributed_checkpoint=True))
    run.fit(module)
    with pytest.raises(ValueError, match="memory://"):
        run.save_checkpoint("memory://model.ckpt")


def other_plugins():
    class Own(lm.MuonCheckpointIO):
        pass

    for strategy in (lm.MuonZero1Strategy(), lm.MuonFSDPStrategy()):
        run = trainer(1, strategy=strategy, plugins=[PoolEnvironment(), Own()])
        assert type(run.strategy.checkpoint_io) is Own
    for name in ("muon_zero1", "muon_fsdp"):
        run = trainer(1, strategy=name, plugins=[PoolEnvironment(), AsyncCheckpointIO()])
        assert type(run.strategy.checkpoint_io.checkpoint_io) is lm.MuonCheckpointIO
        assert type(trainer(1, strategy=name).strategy.checkpoint_io) is lm.MuonCheckpointIO


def other_learning_rates():
    model = awkward_model()
    fsdp(model)
    optimizer = lm.Muon(model, lr=1e-2 * (1 + dist.get_rank()))
    with pytest.raises(RuntimeError, match="lr"):
        adopt(optimizer, model)


def a_module_that_is_whole():
    model = awkward_model()
    with pytest.raises(ValueError, match="not sharded"):
        shard_optimizer(lm.Muon(model), model)


def samplers():
    strategy = lm.MuonFSDPStrategy(tensor_parallel_size=2)
    run = trainer(1, strategy=strategy)
    assert run.strategy.distributed_sampler_kwargs == {
        "num_replicas": dist.get_world_size() // 2,
        "rank": dist.get_rank() // 2,
    }


def fabric(**options):
    made = L.Fabric(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=FabricFSDP(wrap=BLOCKS, **options),
        plugins=[PoolEnvironment()],
    )
    made.launch()
    model = Loss(awkward_model())
    return made, *made.setup(model, lm.Muon(model, lr=1e-2))


def loads_what_it_has_just_saved(path):
    made, model, optimizer = fabric(save_distributed_checkpoint=True, save_in_background=True)
    made.save(path, {"model": model, "optimizer": optimizer, "step": 7})
    assert made.load(path, {"model": model})["step"] == 7


def refuses_before_anything_is_changed(path):
    made, model, optimizer = fabric()
    made.save(path, {"model": model, "optimizer": optimizer, "step": 7})
    made.backward(model(token_batches(1, 4)[0]))
    optimizer.step()
    now = weights(model)
    with pytest.raises(KeyError, match="epoch"):
        made.load(path, {"model": model, "optimizer": optimizer, "epoch": 0})
    optimizer.optimizer._constructed[0]["lr"] = 0.5
    with pytest.raises(ValueError, match="lr"):
        made.load(path, {"model": model, "optimizer": optimizer})
    assert distance(weights(model), now) == 0


@pytest.mark.parametrize("check", [loads_what_it_has_just_saved, refuses_before_anything_is_changed])
def test_fabric(tmp_path, check):
    run_processes(2, check, str(tmp_path / "fabric.ckpt"))


@pytest.mark.parametrize(
    "check", [shards_elsewhere, other_plugins, other_learning_rates, a_module_that_is_whole, samplers]
)
def test_errors_and_choices(check):
    run_processes(2, check)


def train_16_bit(sharded):
    model = awkward_model().to(torch.bfloat16)
    if sharded:
        fsdp(model)
    optimizer = lm.Muon(model, lr=1e-3, master_weights=True, orthogonalization_dtype=torch.float32)
    if sharded:
        adopt(optimizer, model)
    for step in range(5):
        for number, (name, param) in enumerate(model.named_parameters()):
            generator = torch.Generator().manual_seed(100 * step + number)
            full = torch.randn(param.shape, generator=generator).to(torch.bfloat16)
            param.grad = torch.zeros_like(param)
            local = param.grad.to_local() if sharded else param.grad
            local.copy_(optimizer.partition.take(name, full).view_as(local))
        optimizer.step()
    masters = {name: whole(optimizer.state[param]["master_weight"]) for name, param in optimizer.named_parameters()}
    return masters, {name: whole(param) for name, param in model.named_parameters()}


def test_master_weights_in_shards():
    masters, rounded = train_16_bit(False)
    for found, weights_found in run_processes(3, train_16_bit, True):
        for name, master in masters.items():
            assert (found[name] - master).norm() / master.norm() <= 1e-6
            assert torch.equal(weights_found[name], found[name].to(torch.bfloat16))
            assert (weights_found[name] != rounded[name]).float().mean() <= 0.01


def resume_with_masters(path):
    return resume(path, "muon_fsdp", {"master_weights": True})


@pytest.mark.parametrize("folder", [False, True])
def test_master_weights_that_the_saved_run_did_not_have(tmp_path, folder):
    path = str(tmp_path / "model.ckpt")
    run(Layout("saved", 2, folder=folder), save_to=path)
    assert [kind for kind, *_ in run_processes(2, resume_with_masters, path)] == [None, None]


def steps_after_an_evaluation():
    model = awkward_model()
    fsdp(model)
    optimizer = lm.Muon(model, lr=0.1)
    adopt(optimizer, model)
    tokens = token_batches(1, 4)[0]
    model.loss(tokens).backward()
    with torch.no_grad():
        model.loss(tokens)  # leaves the root's weights gathered
    optimizer.step()
    with torch.no_grad():
        after = model.loss(tokens)
    again = awkward_model()
    again.load_state_dict({name: whole(value) for name, value in model.state_dict().items()})
    with torch.no_grad():
        assert torch.allclose(again.loss(tokens), after)


def test_a_step_drops_weights_that_are_about_to_be_old():
    run_processes(2, steps_after_an_evaluation)
