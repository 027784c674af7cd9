"""Plans: exact quantities against brute force, torch's own classes, and what the optimizer really does."""

import itertools
import json
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import lightning_muon as lm
from benchmarks.balance import balance
from benchmarks.shapes import MODELS
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM
from lightning_muon.partition import Alone
from lightning_muon.planning import models
from lightning_muon.planning.costs import RankCosts, costs_of_schemes
from lightning_muon.planning.devices import DEVICES, Device, device
from lightning_muon.planning.exposed import Speeds, exposed_time
from lightning_muon.planning.optimizers import optimizer_of
from lightning_muon.sharding.units import ownership_plan
from lightning_muon.usage import UsageError
from tests.models import awkward_model

WORLD_SIZES = [1, 2, 3, 4, 13]


def small_model():
    model = awkward_model()
    model.experts_up.data = model.experts_up.data.bfloat16()  # two element sizes
    return model


def costs(model, world_size):
    optimizer = lm.Muon(model)
    plan = ownership_plan(optimizer, world_size)
    return optimizer, plan, costs_of_schemes(optimizer, plan)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_bytes_of_muon_zero1_are_those_of_every_element_counted(world_size):
    optimizer, plan, schemes = costs(small_model(), world_size)
    sent, received = ([[0, 0] for _ in range(world_size)] for _ in range(2))
    for name, param in optimizer.named_parameters():
        for element, rank in itertools.product(range(param.numel()), range(world_size)):
            owner = next(s.owner for s in plan.slices[name] if s.start <= element < s.stop)
            if rank != owner:
                for kind, (source, target) in enumerate([(rank, owner), (owner, rank)]):  # gradient, then weight
                    sent[source][kind] += param.element_size()
                    received[target][kind] += param.element_size()
    for rank, found in enumerate(schemes["muon_zero1"]):
        assert [found.sent_gradients, found.sent_weights] == sent[rank]
        assert [found.received_gradients, found.received_weights] == received[rank]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_totals_over_ranks(world_size):
    optimizer, _, schemes = costs(small_model(), world_size)
    weight_bytes = sum(param.nbytes for _, param in optimizer.named_parameters())
    alone = schemes["muon_ddp"][0]
    assert sum(alone.matrices.values()) == 3 + 3 + 5 + 1  # square, tall, wide; q, k, v; experts; convolution
    assert alone.state_bytes == optimizer.local_state_bytes()
    for name, ranks in schemes.items():
        assert len(ranks) == world_size
        assert sum(rank.sent for rank in ranks) == sum(rank.received for rank in ranks), name
    for name in ("adamw_zero1", "muon_zero1"):
        whole = schemes[name.replace("zero1", "ddp")][0]
        for quantity in ("elements", "weight_bytes", "state_bytes", "flops"):
            assert sum(getattr(rank, quantity) for rank in schemes[name]) == getattr(whole, quantity), (name, quantity)
    ours = schemes["muon_zero1"]
    assert sum(rank.sent for rank in ours) == 2 * (world_size - 1) * weight_bytes
    assert sum((rank.matrices for rank in ours), start=type(alone.matrices)()) == alone.matrices
    each = 2 * (world_size - 1) * weight_bytes / world_size
    assert all(abs(rank.sent - each) <= 0.5 for rank in schemes["adamw_ddp"])
    assert sum(rank.sent_weights for rank in schemes["adamw_zero1"]) == (world_size - 1) * weight_bytes


def test_state_of_adamw_is_what_torch_keeps():
    model = small_model()
    _, _, schemes = costs(model, 2)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    adamw = torch.optim.AdamW(model.parameters())
    adamw.step()
    kept = sum(state[key].nbytes for state in adamw.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert schemes["adamw_ddp"][0].state_bytes == kept


def test_zero1_of_adamw_is_torchs_partition():
    model = awkward_model()
    _, _, schemes = costs(model, 3)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    try:
        theirs = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW)._partition_parameters()
    finally:
        dist.destroy_process_group()
    elements = [sum(param.numel() for group in groups for param in group["params"]) for groups in theirs]
    assert [rank.elements for rank in schemes["adamw_zero1"]] == elements


class Part(Alone):
    """The part of one rank in a plan, without processes."""

    is_sharded = True

    def __init__(self, plan, rank):
        self.slices, self.rank, self.world_size = plan.slices, rank, plan.world_size

    def ranges(self, name, numel):
        return [(s.start, s.stop) for s in self.slices[name] if s.owner == self.rank]


def example_model():
    return MoELM(ModelConfig(hidden_size=32, num_hidden_layers=2, intermediate_size=64, moe_intermediate_size=24))


@pytest.mark.parametrize("build", [awkward_model, example_model])
@pytest.mark.parametrize("world_size", [2, 4])
def test_flops_and_state_are_what_a_step_really_has(build, world_size):
    model = build()
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    _, plan, schemes = costs(model, world_size)
    for rank, expected in enumerate(schemes["muon_zero1"]):
        optimizer = lm.Muon(model)
        optimizer.shard(Part(plan, rank))
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        assert counter.get_total_flops() == expected.flops
        assert optimizer.local_state_bytes() == expected.state_bytes


@pytest.mark.parametrize(("name", "world_size"), [("Moonlight-16B", 8), ("Moonlight-16B", 64), ("Llama-7B", 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_models_are_shared_out_evenly(name, world_size, dtype):
    plan = ownership_plan(MODELS[name]().optimizer(dtype), world_size)
    for figures in (plan.flops, plan.state_bytes):
        assert max(figures) * world_size <= 1.05 * sum(figures)


def test_committed_figures_of_balance_are_the_present_ones():
    committed = json.loads((RESULTS / "balance.json").read_text())["models"]
    for name, world_size in (("Moonlight-16B", 64), ("Llama-7B", 256)):
        found = json.loads(json.dumps(balance(MODELS[name](), world_size)))
        assert found == committed[name][str(world_size)]


def test_exposed_time_follows_the_formulas():
    speeds = Speeds(Device("d", flops=100.0, memory_bandwidth=10.0), link=5.0)
    ranks = [RankCosts(0, 4, 6, 200, 40, 10, 10, 40), RankCosts(0, 2, 3, 300, 20, 30, 30, 20)]
    assert tuple(vars(exposed_time("muon_zero1", ranks, speeds)).values()) == (8.0, 4.4, 8.0)
    # 6 s of forward hide most of the weights, 12 s of backward all gradients
    busy = Speeds(speeds.device, link=5.0, tokens_per_rank=30, active_parameters=10)
    assert tuple(vars(exposed_time("muon_zero1", ranks, busy)).values()) == (0.0, 4.4, 2.0)
    assert exposed_time("adamw_zero1", ranks, busy).weights == 8.0
    assert exposed_time("muon_zero1", ranks, busy).total == 6.4


def test_devices():
    assert device("h200") is not None
    assert device("h200", teraflops=1.0) == Device("h200", 1e12, DEVICES["h200"].memory_bandwidth)
    assert device("mine", teraflops=2.0, gigabytes=3.0) == Device("mine", 2e12, 3e9)
    with pytest.raises(UsageError, match=r"there are a100, .*--flops"):
        device("cpu", teraflops=1.0)


# ---------------------------------------------------------------- where the model comes from


def shapes_of(model):
    named = model.named_parameters() if isinstance(model, nn.Module) else model
    return {name: tuple(param.shape) for name, param in named}


def test_shapes_from_json_and_csv(tmp_path):
    expected = {"embed_tokens.weight": (32, 8), "layers.0.wq.weight": (8, 8), "norm.weight": (8,)}
    (tmp_path / "s.json").write_text(json.dumps({name: list(shape) for name, shape in expected.items()}))
    lines = [f"{name},{'x'.join(map(str, shape))}\n" for name, shape in expected.items()]
    (tmp_path / "s.csv").write_text("".join(lines))
    for file in ("s.json", "s.csv"):
        named = models.from_shapes(tmp_path / file)
        assert shapes_of(named) == expected
        assert lm.Muon(named).routes["layers.0.wq.weight"].algorithm == "muon"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.csv", "", "expected a JSON object"),
        ("s.csv", "w,4x-1\n", "'w' has the shape '4x-1'"),
        ("s.csv", "w\n", "'w' has the shape ''"),
        ("s.csv", "w,2x2\nw,2x2\n", "two parameters are named 'w'"),
        ("s.json", '{"w": [2, 2], "w": [2, 2]}', "two parameters are named 'w'"),
        ("s.json", "[[2, 2]]", "expected a JSON object"),
        ("s.json", "{", "Expecting property name"),
        ("s.txt", "w,2x2", r"expected a .json or a .csv"),
    ],
)
def test_shapes_that_are_none(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        models.from_shapes(tmp_path / name)


def test_a_class_is_built_on_the_meta_device():
    module = models.from_class("torch.nn.Linear", {"in_features": 1 << 20, "out_features": 1 << 20})
    assert module.weight.is_meta
    with pytest.raises(UsageError, match=r"cannot import 'torch\.nn\.Missing'"):
        models.from_class("torch.nn.Missing", {})
    with pytest.raises(UsageError, match=r"meta device: TypeError: .*widht"):
        models.from_class("torch.nn.Linear", {"widht": 1})
    with pytest.raises(UsageError, match="made a OrderedDict"):
        models.from_class("collections.OrderedDict", {})


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FOLDER = Path(__file__).parents[2] / "examples" / "moe_lm" / "configs"
CONFIGS = [FOLDER / "small.yaml", FOLDER / "moonlight_16b_a3b.yaml"]


def test_configurations_of_lightning_cli(tmp_path):
    moonlight = models.from_configs("examples.moe_lm.model.MoELM", CONFIGS)
    assert sum(param.numel() for param in moonlight.parameters()) == 15_960_108_544
    assert moonlight.adamw_lr == 1.6e-2  # from the first file
    subclass = tmp_path / "subclass.yaml"
    subclass.write_text("model: {class_path: torch.nn.Linear, init_args: {in_features: 3, out_features: 5}}\n")
    assert shapes_of(models.from_configs(None, [subclass])) == {"weight": (5, 3), "bias": (5,)}
    with pytest.raises(UsageError, match="name no class"):
        models.from_configs(None, CONFIGS)
    subclass.write_text("model: {class_path: torch.nn.Linear, init_args: {in_features: many, out_features: 5}}\n")
    with pytest.raises(UsageError, match=r"(?s)subclass\.yaml.*in_features"):
        models.from_configs(None, [subclass])


def test_precision_in_a_configuration(tmp_path):
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("trainer: {precision: bf16-true}\n")
    second.write_text("model: {}\n")
    assert models.dtype_of_configs([first, second]) == torch.bfloat16
    second.write_text("trainer: {precision: 32-true}\n")
    assert models.dtype_of_configs([first, second]) is None


@pytest.fixture
def llama(tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def test_a_hugging_face_configuration(llama, monkeypatch):
    (llama / "llama.json").write_text((llama / "config.json").read_text())
    for path in (llama, llama / "config.json", llama / "llama.json"):
        module = models.from_hugging_face(path)
        assert all(param.is_meta for param in module.parameters())
        assert shapes_of(module)["model.layers.1.mlp.up_proj.weight"] == (96, 64)
    with pytest.raises(UsageError, match="there is no such file"):
        models.from_hugging_face(llama / "nowhere")
    (llama / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(UsageError, match="unheard-of"):
        models.from_hugging_face(llama)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="pip install transformers"):
        models.from_hugging_face(llama)


# ---------------------------------------------------------------- which optimizer


class Lit(L.LightningModule):
    """A LightningModule whose optimizer is ``make(self)``, and whose layers come late."""

    def __init__(self, make):
        super().__init__()
        self.make = make
        self.layer = None

    def configure_model(self):
        if self.layer is None:
            self.layer = nn.Linear(8, 8)

    def configure_optimizers(self):
        return self.make(self)


def lit(make):
    module = Lit(make)
    module.configure_model()
    return module


def with_schedule(module):
    optimizer = lm.Muon(module, rules=[lm.Rule("layer", algorithm="adamw")])
    steps = module.trainer.estimated_stepping_batches
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=steps)}]


def test_the_optimizer_is_the_one_of_the_run():
    optimizer, origin = optimizer_of(lit(with_schedule), None)
    assert origin == "configure_optimizers()"
    assert optimizer.routes["layer.weight"].algorithm == "adamw"
    optimizer, origin = optimizer_of(lit(lambda module: torch.optim.SGD(module.parameters())), None)
    assert origin == "lightning_muon.Muon(model), as configure_optimizers() returns SGD"
    assert optimizer.routes["layer.weight"].algorithm == "muon"
    optimizer, origin = optimizer_of(lit(with_schedule), {"rules": [], "orthogonalization": "keller5"})
    assert origin == "--muon"
    assert optimizer.routes["layer.weight"].algorithm == "muon"
    optimizer, _ = optimizer_of(nn.Linear(4, 4), {"rules": [{"pattern": "weight", "split_sizes": [2, 2]}]})
    assert optimizer.routes["weight"].layout.num_matrices == 2


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda module: 1 / 0, None, r"ZeroDivisionError.*--muon"),
        (lambda module: [lm.Muon(module), lm.Muon(module)], None, "returns 2 optimizers"),
        (with_schedule, {"momentun": 1}, "momentun"),
        (with_schedule, {"rules": [{"pattern": "nothing like it"}]}, "is in no parameter's name"),
    ],
)
def test_optimizers_that_cannot_be_planned(make, options, message):
    with pytest.raises(UsageError, match=message):
        optimizer_of(lit(make), options)
