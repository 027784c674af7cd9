"""The acceptance of the sharding on the example's mixture of experts."""

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import lightning_muon as lm
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM, next_token_nll
from lightning_muon.sharding.units import ownership_plan
from tests.lightning_runs import PoolEnvironment, trainer
from tests.processes import run_processes
from tests.references import relative_error
from tests.sharding import ShardedTraining, Training

STEPS = 20
GEOMETRY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "intermediate_size": 72,
    "moe_intermediate_size": 24,
    "n_routed_experts": 6,
    "max_seq_len": 16,
}


class PinnedRouting(MoELM):
    """Every token goes to two experts by its position, so that rounding cannot flip a tie between two scores."""

    def __init__(self):
        super().__init__(ModelConfig(**GEOMETRY))
        for layer in self.moe_layers.values():
            layer.gate.forward = lambda x, gate=layer.gate: _by_position(x, gate)

    def loss(self, windows):
        return next_token_nll(self(windows[:, :-1]), windows[:, 1:]).mean()


def _by_position(x_NH, gate):
    scores_NE = torch.sigmoid(x_NH.float() @ gate.weight.float().T)
    first_N = torch.arange(len(x_NH)) % scores_NE.shape[1]
    experts_NK = torch.stack([first_N, (first_N + 1) % scores_NE.shape[1]], dim=1)
    weights_NK = scores_NE.gather(1, experts_NK)
    return experts_NK, weights_NK / weights_NK.sum(-1, keepdim=True)


class _Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, windows):
        return self.model.loss(windows)


def train(sharded):
    torch.manual_seed(0)
    model = PinnedRouting().train()
    optimizer = lm.Muon(model, lr=8e-3, orthogonalization_dtype=torch.float32)
    loss = _Loss(model)
    training = ShardedTraining(loss, optimizer, bucket_cap_mb=0.05) if sharded else Training(loss, optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        # 12 windows of 12 tokens: every rank's tokens start at expert 0 again
        windows = torch.randint(0, 257, (12, 13), generator=generator)
        optimizer.zero_grad()
        training.backward(training(share(windows, training.world_size, training.rank)))
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, optimizer.local_state_bytes()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_twenty_steps_equal_one_process(world_size):
    expected, state_bytes = train(sharded=False)
    results = run_processes(world_size, train, True)
    for name, weight in expected.items():
        assert relative_error(results[0][0][name], weight) <= 1e-5, name
        assert all(torch.equal(result[0][name], results[0][0][name]) for result in results), name
    assert sum(result[1] for result in results) == state_bytes


class ByStep(PinnedRouting):
    """The whole LightningModule of the example, balancing included, on this rank's share of the global batch."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()

    def training_step(self, batch, batch_idx):
        return super().training_step(share(batch, self.trainer.world_size, self.global_rank), batch_idx)

    def train_dataloader(self):
        return DataLoader(global_batches(), batch_size=None)


def global_batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 257, (12, 13), generator=generator) for _ in range(STEPS)]


def share(windows, world_size, rank):
    return windows.chunk(world_size)[rank]


def through_trainer(strategy):
    module = ByStep()
    run = trainer(STEPS, strategy=strategy, gradient_clip_val=1.0)
    run.fit(module)
    return {name: p.detach().clone() for name, p in module.state_dict().items()}


def through_fabric(strategy):
    fabric = L.Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, plugins=[PoolEnvironment()])
    fabric.launch()
    module = ByStep()
    model, optimizer = fabric.setup(module, module.make_optimizer())
    scheduler = module.make_scheduler(optimizer, STEPS)
    model.train()
    for windows in global_batches():
        mine = share(windows, fabric.world_size, fabric.global_rank)
        fabric.backward(next_token_nll(model(mine[:, :-1]), mine[:, 1:]).mean())
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        module.balance_experts()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in module.state_dict().items()}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("run", [through_trainer, through_fabric])
def test_trainer_and_fabric_equal_one_process(run, world_size):
    (expected,) = run_processes(1, through_trainer, "auto")
    results = run_processes(world_size, run, "muon_zero1")
    for name, value in expected.items():
        assert relative_error(results[0][name], value) <= 1e-5 or torch.equal(results[0][name], value), name
        assert all(torch.equal(result[name], results[0][name]) for result in results), name


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_state_is_balanced(world_size):
    optimizer = lm.Muon(MoELM(ModelConfig()))
    plan = ownership_plan(optimizer, world_size)
    assert sum(plan.state_bytes) == optimizer.local_state_bytes()
    assert max(plan.state_bytes) <= 1.15 * sum(plan.state_bytes) / world_size
    assert max(plan.flops) <= 1.15 * sum(plan.flops) / world_size
