"""QK-Clip on several processes: the same as on one, and the same bits on every replica."""

from functools import partial

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lightning_muon as lm
from lightning_muon.fabric import MuonFSDPStrategy, MuonZero1Strategy
from tests.attention_models import build, describe, inputs, plant
from tests.fsdp.layouts import adopt, copies_agree, fsdp, hsdp, whole
from tests.lightning_runs import PoolEnvironment
from tests.processes import run_processes
from tests.sharding import ShardedTraining, Training

STEPS = 6
TAU = 0.5  # which the logits of these models cross again and again


def muon(model, **options):
    # in float64, since a rank-deficient momentum makes much of the order of sums
    return lm.Muon(model, lr=3e-2, orthogonalization_dtype=torch.float64, **options)


def batches(steps=STEPS):
    return [torch.cat([inputs(10 * step + part) for part in range(4)]) for step in range(steps)]  # 12 examples


class DDPTraining(Training):
    """Every process steps by itself."""

    def __init__(self, module, optimizer):
        super().__init__(DistributedDataParallel(module), optimizer)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()


def sharded(layout, module, optimizer):
    whole_ones = list(module.parameters())
    layout(module, [name for name, _ in module.named_children() if name == "self_attn"])
    optimizer.replace_parameters(dict(zip(whole_ones, module.parameters(), strict=True)))
    adopt(optimizer, module)
    training = Training(module, optimizer)
    training.rank, training.world_size = dist.get_rank(), dist.get_world_size()
    return training


WAYS = {
    "alone": Training,
    "ddp": DDPTraining,
    "zero1": ShardedTraining,
    "zero1_without_overlap": partial(ShardedTraining, options={"overlap": False}),
    "fsdp": partial(sharded, fsdp),
    "hsdp": partial(sharded, hsdp),
}


def train(way, kind, dtype=torch.float64, accumulate=1, tau=TAU, **options):
    """Weights, S at every step, whose masters round to them, and how often a head was clipped."""
    model = build(kind).to(dtype)
    plant(model, kind, inputs().to(dtype), head=1, largest=9.0)
    optimizer = muon(model, **options)
    training = WAYS[way](model, optimizer)
    clipper = lm.QKClipper(training.module, tau=tau, heads=describe)
    seen, clipped = [], 0
    for batch in batches():
        micro_batches = batch.to(dtype).chunk(training.world_size)[training.rank].chunk(accumulate)
        for number, micro_batch in enumerate(micro_batches, start=1):
            set_sync(training, number == len(micro_batches))
            training.backward(training(micro_batch).square().mean() / accumulate)
        optimizer.step()
        optimizer.zero_grad()
        clipper.clip(optimizer)
        clipped += sum(value for key, value in clipper.figures().items() if "clipped" in key)
        seen += list(clipper.maxima.values())
        assert replicas_agree(model)
        assert masters_agree(model, optimizer)
    return {name: whole(param) for name, param in model.named_parameters()}, seen, clipped


def set_sync(training, is_last):
    if isinstance(training.module, DistributedDataParallel):
        training.module.require_backward_grad_sync = is_last


def replicas_agree(model):
    if not dist.is_initialized():
        return True
    for param in model.parameters():
        if isinstance(param, DTensor):
            if not copies_agree(param):
                return False
        else:
            first = param.detach().clone()
            dist.broadcast(first, 0)
            if not torch.equal(first, param.detach()):
                return False
    return True


def masters_agree(model, optimizer):
    """Whether every weight is its float32 copy, rounded."""
    optimizer.consolidate_state_dict(0)
    if dist.is_initialized() and dist.get_rank():
        params = {name: whole(param) for name, param in model.named_parameters()}  # a collective where it is sharded
        return bool(params)
    params = {name: whole(param) for name, param in model.named_parameters()}
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    for number, name in enumerate(names):
        master = state["state"][number].get("master_weight")
        if master is not None and not torch.equal(master.to(params[name].dtype), params[name]):
            return False
    return True


@pytest.mark.parametrize(
    ("way", "world_size", "kinds"),
    [
        ("zero1", 1, ["mla"]),
        ("zero1", 2, ["mha", "gqa", "mla", "bias", "fused"]),
        ("zero1", 3, ["mha", "gqa", "mla", "bias", "fused"]),
        ("zero1_without_overlap", 2, ["mla"]),
        ("fsdp", 2, ["mha", "gqa", "mla", "bias"]),
        ("fsdp", 3, ["mha", "mla", "fused"]),
        ("hsdp", 4, ["mla", "bias"]),
    ],
)
def test_equals_one_process(way, world_size, kinds):
    for kind in kinds:
        compare(way, world_size, kind)


def compare(way, world_size, kind):
    expected, seen, clipped = run_processes(1, train, "alone", kind)[0]
    assert clipped >= STEPS, "or this shows nothing"
    for weights, also_seen, also_clipped in run_processes(world_size, train, way, kind):
        assert also_clipped == clipped
        for step, also in zip(seen, also_seen, strict=True):
            assert also == pytest.approx(step, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_ddp():
    expected, seen, _ = run_processes(1, train, "alone", "mla")[0]
    for weights, also_seen, _ in run_processes(2, train, "ddp", "mla"):
        assert also_seen[0] == pytest.approx(seen[0], rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("way", "world_size"), [("alone", 1), ("zero1", 2), ("zero1", 3), ("fsdp", 2), ("hsdp", 4)])
def test_master_weights_in_bfloat16(way, world_size):
    """That they round to the weights on every process is checked within."""
    results = run_processes(world_size, train_16_bit, way)
    assert results[0][2] >= STEPS
    assert all(torch.equal(result[0][name], weight) for result in results for name, weight in results[0][0].items())


def train_16_bit(way):
    return train(way, "mla", torch.bfloat16, master_weights=True)


def scaled_once(way):
    """What one clip does to the float32 copies, by name, and to the weights."""
    model = build("mla").bfloat16()
    plant(model, "mla", inputs().bfloat16(), head=1)
    optimizer = muon(model, master_weights=True)
    training = WAYS[way](model, optimizer)
    clipper = lm.QKClipper(training.module)
    x = batches(1)[0].bfloat16()
    training.backward(training(x.chunk(training.world_size)[training.rank]).square().mean())
    optimizer.step()
    before = masters(optimizer)
    clipper.clip(optimizer)
    return before, masters(optimizer), clipper.maxima["self_attn"]


def masters(optimizer):
    optimizer.consolidate_state_dict(0)
    if dist.get_rank():
        return {}
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    return {name: state["state"][number]["master_weight"].clone() for number, name in enumerate(names)}


@pytest.mark.parametrize(("way", "world_size"), [("zero1", 3), ("fsdp", 3)])
def test_master_weights_are_scaled_exactly(way, world_size):
    before, after, found = run_processes(world_size, scaled_once, way)[0]
    factors = {name: torch.ones(weight.shape[0]) for name, weight in before.items()}
    above = [head for head, s in enumerate(found) if s > 100]
    assert above == [1]
    for name, rows, power in (("q_proj", (9, 14), 0.5), ("q_proj", (14, 18), 1.0), ("kv_b_proj", (8, 13), 0.5)):
        factors[f"self_attn.{name}.weight"][slice(*rows)] = (100 / found[1]) ** power
    for name, weight in before.items():
        expected = weight * factors[name].view(-1, *[1] * (weight.ndim - 1))
        assert torch.equal(after[name], expected), name


@pytest.mark.parametrize(("way", "world_size"), [("zero1", 2), ("fsdp", 2)])
def test_accumulation_counts_every_micro_batch(way, world_size):
    _, seen, _ = run_processes(1, train, "alone", "gqa")[0]
    for _, also_seen, _ in run_processes(world_size, train_accumulating, way):
        for step, also in zip(seen, also_seen, strict=True):
            assert also == pytest.approx(step, rel=1e-5)


def train_accumulating(way):
    return train(way, "gqa", accumulate=3)


def unseen_on_one():
    """Only rank 1 runs attention where it cannot be seen."""
    model = build("bias")
    original = model.kernel
    if dist.get_rank() == 1:
        model.kernel = lambda query, key, value: value
    clipper = lm.QKClipper(torch.nn.ModuleDict({"attn": model}))
    model(inputs())
    model.kernel = original
    try:
        clipper.reduce()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_an_error_of_one_rank_does_not_leave_the_others_waiting():
    # rank 0 has seen it: there is a maximum, and all go on
    assert run_processes(2, unseen_on_one) == ["nothing", "nothing"]
    first, second = run_processes(2, unseen_on_all)
    assert first == second
    assert "attn: attention has run and its logits were not seen" in first


def unseen_on_all():
    """Rank 0 does not run it at all."""
    model = build("bias")
    model.kernel = lambda query, key, value: value
    clipper = lm.QKClipper(torch.nn.ModuleDict({"attn": model}))
    if dist.get_rank() == 1:
        model(inputs())
    try:
        clipper.reduce()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def through_fabric(strategy):
    strategies = {"muon_zero1": MuonZero1Strategy, "muon_fsdp": partial(MuonFSDPStrategy, wrap=(torch.nn.Linear,))}
    fabric = L.Fabric(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategies[strategy](),
        plugins=[PoolEnvironment()],
    )
    fabric.launch()
    bare = build("mla").double()
    plant(bare, "mla", inputs().double(), head=1, largest=9.0)
    model, optimizer = fabric.setup(bare, muon(bare))
    clipper = lm.QKClipper(model, tau=TAU)
    for batch in batches():
        x = batch.double().chunk(fabric.world_size)[fabric.global_rank]
        fabric.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        clipper.clip(optimizer)
    return {name: whole(param) for name, param in bare.named_parameters()}, list(clipper.maxima)


@pytest.mark.parametrize("strategy", ["muon_zero1", "muon_fsdp"])
def test_in_a_fabric_loop(strategy):
    expected, _, _ = run_processes(1, train, "alone", "mla")[0]
    for weights, names in run_processes(2, through_fabric, strategy):
        assert names == ["self_attn"]
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)
