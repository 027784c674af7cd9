"""What ExpertLoadMonitor logs of the example's model, through the Trainer and Fabric, on any number of processes."""

import re
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader

import lightning_muon as lm
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM, next_token_nll
from tests.lightning_runs import PoolEnvironment, trainer, weights
from tests.processes import run_processes

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
    "initializer_range": 0.2,
}
STEPS = 4
LAYERS = ("model.layers.1.mlp", "model.layers.2.mlp")
FAMILIES = ("max_vio", "min_load", "load_entropy", "dead_experts", "router_entropy", "routing_confidence")


class Notes(Logger):
    """A logger that keeps what every process gives it."""

    name, version = "notes", 0

    def __init__(self):
        super().__init__()
        self.calls = []

    def log_metrics(self, metrics, step=None):
        values = {key: value for key, value in metrics.items() if key.startswith(("moe/", "muon/alarms"))}
        if values:
            self.calls.append((step, values))

    def log_hyperparams(self, *args, **kwargs):
        pass


class Module(MoELM):
    """Keeps the MaxVio that the balancing finds; before each training forward comes one without a backward."""

    def __init__(self, optimizer="muon", extra_forward=False):
        torch.manual_seed(0)
        super().__init__(ModelConfig(**GEOMETRY), optimizer=optimizer)
        self.extra_forward = extra_forward
        self.max_vio = []

    def balance_experts(self):
        self.max_vio.append({f"moe/max_vio/{name}": value.item() for name, value in super().balance_experts().items()})

    def training_step(self, batch, batch_idx):
        windows = batch.chunk(self.trainer.world_size)[self.global_rank]
        if self.extra_forward:
            with torch.no_grad():
                self(windows[:1, :7])
        return super().training_step(windows, batch_idx)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        batches = [torch.randint(0, 257, (6, 13), generator=generator) for _ in range(2 * STEPS)]
        return DataLoader(batches, batch_size=None)

    def val_dataloader(self):
        return DataLoader([torch.randint(0, 257, (2, 13))], batch_size=None)


def through_trainer(strategy, monitor_options=None, module_options=None, **trainer_options):
    module, notes = Module(**(module_options or {})), Notes()
    monitors = [] if monitor_options is None else [lm.ExpertLoadMonitor(**monitor_options)]
    options = {"max_steps": STEPS, "logger": [notes], "callbacks": monitors, "log_every_n_steps": 2}
    run = trainer(strategy=strategy, **{**options, **trainer_options})
    run.fit(module)
    hooks = sum(len(m._forward_hooks) for name, m in module.named_modules() if name.endswith("gate"))
    return notes.calls, module.max_vio, weights(module), hooks


def with_accumulation_and_validation(strategy, monitor_options):
    options = {"accumulate_grad_batches": 2, "limit_val_batches": 1, "val_check_interval": 1}
    return through_trainer(strategy, monitor_options, **options)


@pytest.mark.parametrize(
    ("world_size", "strategy"), [(1, "auto"), (2, "ddp"), (2, "muon_zero1"), (3, "muon_zero1"), (3, "muon_fsdp")]
)
def test_the_same_values_as_one_process_and_as_the_balancing(world_size, strategy):
    """With accumulation, and with validation in the middle of it."""
    (one,) = run_processes(1, with_accumulation_and_validation, "auto", {"mode": "detailed"})
    results = run_processes(world_size, with_accumulation_and_validation, strategy, {"mode": "detailed"})
    for calls, max_vio, _, hooks in results:
        assert hooks == 0
        assert [step for step, _ in calls] == [2, 4]
        for step, values in calls:
            found = {key: values[key] for key in max_vio[step - 1]}
            assert found == pytest.approx(max_vio[step - 1], rel=1e-6)  # the balancing computes in float32
        assert calls == results[0][0]
    # rounding may send a token elsewhere once the weights differ by it; before the first step they do not
    assert results[0][1][0] == pytest.approx(one[1][0], abs=1e-6)


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_over_processes_are_those_of_one(world_size):
    options = {"every_n_steps": 1, "mode": "detailed"}
    ((expected, *_),) = run_processes(1, through_trainer, "auto", options)
    for found, *_ in run_processes(world_size, through_trainer, "muon_zero1", options):
        assert [step for step, _ in found] == [1, 2, 3, 4]
        assert found[0] == (1, pytest.approx(expected[0][1], rel=1e-5))
    keys = {f"moe/{family}/{end}" for family in FAMILIES for end in (*LAYERS, "_min", "_mean", "_max")}
    keys |= {f"moe/load/{layer}.{expert}" for layer in LAYERS for expert in range(6)} | {"muon/alarms/dead_experts"}
    assert expected[0][1].keys() == keys


def test_the_keys_of_the_document_are_those_logged():
    document = Path(__file__).parents[2] / "docs" / "experts.md"
    documented = set(re.findall(r"^\| `(\w+/\w+[^`]*)`", document.read_text(), flags=re.MULTILINE))
    ((calls, *_),) = run_processes(1, through_trainer, "auto", {"mode": "detailed"})
    logged = {re.sub(r"model\.layers\.\d\.mlp|_min$|_mean$|_max$", "<layer>", key) for key in calls[0][1]}
    assert {re.sub(r"\.\d$", ".<expert>", key) for key in logged} == documented


def checkpointed_fsdp(activation_checkpointing):
    strategy = lm.MuonFSDPStrategy(activation_checkpointing=activation_checkpointing)
    monitor = {"every_n_steps": 1, "mode": "detailed"}
    return through_trainer(strategy, monitor, {"extra_forward": True}, max_steps=1)[:2]


@pytest.mark.parametrize("world_size", [1, 3])
def test_activation_checkpointing_of_muon_fsdp(world_size):
    """The forward without a backward is not computed again: counted twice, the others would weigh more."""
    (expected, own_without), *_ = run_processes(world_size, checkpointed_fsdp, False)
    (found, own), *_ = run_processes(world_size, checkpointed_fsdp, True)
    assert found == [(1, pytest.approx(expected[0][1], rel=1e-6))]
    assert own == own_without  # the example's own count for its balancing


@pytest.mark.parametrize("strategy", ["auto", "muon_zero1"])
def test_training_is_bitwise_the_same(strategy):
    for options in ({"optimizer": "muon"}, {"optimizer": "adamw"}):
        (with_it, without) = (run_processes(1, through_trainer, strategy, m, options)[0] for m in ({}, None))
        assert len(with_it[0]) == 2
        assert not without[0]
        for name, weight in without[2].items():
            assert torch.equal(with_it[2][name], weight), name


def test_the_interval_and_the_default(tmp_path):
    ((calls, *_),) = run_processes(1, through_trainer, "auto", {})
    assert [step for step, _ in calls] == [2, 4]  # log_every_n_steps
    ((calls, max_vio, *_),) = run_processes(1, through_trainer, "auto", {"every_n_steps": 3, "include": r"\.2\."})
    assert [step for step, _ in calls] == [3]
    assert calls[0][1]["moe/max_vio/model.layers.2.mlp"] == pytest.approx(max_vio[2]["moe/max_vio/model.layers.2.mlp"])
    assert "moe/max_vio/model.layers.1.mlp" not in calls[0][1]


def through_fabric(strategy):
    fabric = L.Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, plugins=[PoolEnvironment()])
    fabric.launch()
    module = Module()
    model, optimizer = fabric.setup(module, module.make_optimizer())
    loads, found = lm.ExpertLoads(model), []
    for step, windows in enumerate(module.train_dataloader(), start=1):
        mine = windows.chunk(fabric.world_size)[fabric.global_rank]
        if step % 2 == 0:
            loads.start()
        fabric.backward(next_token_nll(model(mine[:, :-1]), mine[:, 1:]).mean())
        module.balance_experts()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 0:
            values = loads.collect(step)
            found.append({key: values[key] for key in module.max_vio[-1]})
    loads.close()
    return found, module.max_vio[1::2]


@pytest.mark.parametrize("strategy", ["ddp", "muon_zero1", "muon_fsdp"])
def test_fabric(strategy):
    for found, max_vio in run_processes(2, through_fabric, strategy):
        assert len(found) == STEPS
        assert found == [pytest.approx(values, rel=1e-6) for values in max_vio]


class SometimesOneLayer(nn.Module):
    """Rank 0 alone runs the second layer, once."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"gate": nn.Linear(2, 4), "experts": nn.Linear(2, 2)})] * 1)
        self.layers.append(nn.ModuleDict({"gate": nn.Linear(2, 5), "experts": nn.Linear(2, 2)}))


def one_rank_alone():
    torch.manual_seed(0)
    model = SometimesOneLayer()
    read = lambda module, inputs, output: (output.topk(2).indices, None, output.shape[-1])  # noqa: E731
    loads, found = lm.ExpertLoads(model, read=read, mode="detailed"), []
    x = torch.randn(3, 10, 2)[dist.get_rank()]
    for step in (1, 2, 3):
        loads.start()
        if dist.get_rank() < step:
            model.layers[0]["gate"](x)
        if step == 2 and dist.get_rank() == 0:
            model.layers[1]["gate"](x)
        found.append(loads.collect(step))
    picks = [model.layers[number]["gate"](x).topk(2).indices.flatten().tolist() for number in (0, 1)]
    return found, picks


def test_ranks_that_have_not_seen_a_layer():
    results = run_processes(3, one_rank_alone)
    first, second = ([picks[layer] for _, picks in results] for layer in (0, 1))
    for found, _ in results:
        assert found == results[0][0]
        for step, values in enumerate(found, start=1):
            seen = [expert for picks in first[:step] for expert in picks]
            loads = [values[f"moe/load/layers.0.{expert}"] for expert in range(4)]
            assert loads == pytest.approx([seen.count(expert) / len(seen) for expert in range(4)])
            assert any(key.startswith("moe/load/layers.1") for key in values) == (step == 2)
        loads = [found[1][f"moe/load/layers.1.{expert}"] for expert in range(5)]
        assert loads == pytest.approx([second[0].count(expert) / 20 for expert in range(5)])


class NoExperts(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.randn(4, 2))


def test_errors(tmp_path):
    options = {"accelerator": "cpu", "default_root_dir": str(tmp_path)}
    with pytest.raises(MisconfigurationException, match=r"ExpertLoadMonitor: No router of experts.*Pass routers="):
        trainer(1, "auto", logger=Notes(), callbacks=[lm.ExpertLoadMonitor()], **options).fit(NoExperts())
    with pytest.raises(MisconfigurationException, match="needs a logger"):
        trainer(1, "auto", callbacks=[lm.ExpertLoadMonitor()], **options).fit(NoExperts())
    with pytest.raises(ValueError, match="every_n_steps=0"):
        lm.ExpertLoadMonitor(every_n_steps=0)
    with pytest.raises(ValueError, match="mode='all'"):
        lm.ExpertLoadMonitor(mode="all")


def test_a_router_that_cannot_be_read_is_told_in_the_first_step_and_no_hook_stays(tmp_path):
    class Silent(Module):
        def train_dataloader(self):
            for layer in self.moe_layers.values():
                forward = layer.gate.forward
                layer.gate.forward = lambda x, forward=forward: list(forward(x))
            return super().train_dataloader()

    module = Silent()
    run = trainer(STEPS, "auto", accelerator="cpu", logger=Notes(), callbacks=[lm.ExpertLoadMonitor(every_n_steps=50)])
    with pytest.raises(TypeError, match=r"the router Router returns is not understood: \(int64 \(72, 2\)"):
        run.fit(module)
    assert run.global_step == 0
    assert not any(m._forward_hooks for m in module.modules())
