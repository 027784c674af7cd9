"""Weights on their way: exact bytes, every reader waits, and the result is that of a step that waits itself."""

import copy
import os
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounter

import lightning_muon as lm
from lightning_muon.sharding import publish
from lightning_muon.sharding.collectives import Gathering
from lightning_muon.sharding.in_flight import InFlight
from lightning_muon.sharding.zero1 import Zero1, Zero1Options
from tests.models import awkward_model, token_batches
from tests.processes import run_processes
from tests.sharding import ShardedTraining


class PayloadCounter:
    """Bytes handed to ``all_to_all_single``, the only collective whose payload grows with the model."""

    def __enter__(self):
        self.sent = self.received = self.calls = 0
        self._original = dist.all_to_all_single

        def counting(output, input, output_splits, input_splits, **kwargs):
            rank = dist.get_rank()
            self.calls += 1
            self.sent += (sum(input_splits) - input_splits[rank]) * input.element_size()
            self.received += (sum(output_splits) - output_splits[rank]) * output.element_size()
            return self._original(output, input, output_splits, input_splits, **kwargs)

        dist.all_to_all_single = counting
        return self

    def __exit__(self, *_):
        dist.all_to_all_single = self._original


def loss_of(training, tokens):
    return training(tokens[:, :-1]).logsumexp(-1).mean()


def step(training, tokens):
    training.optimizer.zero_grad()
    training.backward(loss_of(training, tokens.chunk(training.world_size)[training.rank]))
    training.optimizer.step()


def payload(dtype):
    model = awkward_model().to(dtype)
    training = ShardedTraining(model, lm.Muon(model, lr=0.01))
    batches = token_batches(3, 12)
    step(training, batches[0])
    with PayloadCounter() as counter:
        step(training, batches[1])
    elements = sum(param.numel() for param in model.parameters())
    optimizer = training.optimizer
    owned = sum(
        stop - start for name, p in optimizer.named_parameters() for start, stop in optimizer.local_ranges(name, p)
    )
    itemsize = dtype.itemsize
    others = training.world_size - 1
    return {
        "sent": counter.sent,
        "received": counter.received,
        "expected": (elements - owned + others * owned) * itemsize,
        "calls": counter.calls,
        "parameter_bytes": elements * itemsize,
    }


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_sends_what_ddp_sends_to_the_byte(world_size, dtype):
    """DDP's all-reduce sends 2(N-1)/N of the parameters' bytes from every rank."""
    results = run_processes(world_size, payload, dtype)
    for result in results:
        assert result["sent"] == result["received"] == result["expected"]
        assert result["calls"] > 5, "more than one stage, or this test says little"
    ddp = 2 * (world_size - 1) * results[0]["parameter_bytes"]  # all ranks together
    assert sum(result["sent"] for result in results) == ddp


def in_flight(model):
    return [name for name, param in model.named_parameters() if isinstance(param, InFlight)]


def travels_and_lands():
    model = awkward_model()
    training = ShardedTraining(model, lm.Muon(model, lr=0.01))
    tokens = token_batches(1, 12)[0]
    step(training, tokens)
    assert len(in_flight(model)) == len(list(model.parameters()))
    model.embed_tokens(tokens)  # reads one weight: its stage lands, the others may stay
    assert "embed_tokens.weight" not in in_flight(model)
    assert "lm_head.weight" in in_flight(model)
    model.eval()
    with torch.inference_mode():
        model(tokens)
    assert not in_flight(model)
    step(training, tokens)
    copied = copy.deepcopy(model)
    assert not in_flight(model)
    first = [param.detach().clone() for param in copied.parameters()]
    for param in first:
        dist.broadcast(param, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, model.parameters(), strict=True))


def waits_where_it_was_told_to():
    model = awkward_model()
    training = ShardedTraining(model, lm.Muon(model, lr=0.01), options={"overlap": False})
    step(training, token_batches(1, 12)[0])
    assert not in_flight(model)


class Compiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def train_compiled(how, steps=4):
    torch.manual_seed(0)
    model = Compiled()
    if how == "child":
        model.first = torch.compile(model.first, backend="eager")
    elif how == "module.compile":
        model.second.compile(backend="eager")
    elif how == "script":
        model.first = torch.jit.script(model.first)
    training = ShardedTraining(model, lm.Muon(model, lr=0.05))
    counter = CompileCounter()
    forward = torch.compile(training.module, backend=counter) if how == "outside" else training.module
    compilations = []
    for number in range(steps):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        training.optimizer.zero_grad()
        training.backward(forward(x).square().mean())
        training.optimizer.step()
        compilations.append(counter.frame_count)
    left = in_flight(model)
    return [param.detach().clone() for param in model.parameters()], left, compilations


@pytest.mark.parametrize("how", ["child", "module.compile", "script", "outside"])
@pytest.mark.filterwarnings("ignore")
def test_compiled_modules(how):
    expected, travelling, _ = run_processes(2, train_compiled, "not at all")[0]
    assert travelling
    for weights, left, compilations in run_processes(2, train_compiled, how):
        assert all(torch.equal(found, wanted) for found, wanted in zip(weights, expected, strict=True))
        assert not left, "compiled code would be compiled again for every step"
        assert compilations[-1] == compilations[-2]


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(
                torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.use_reentrant)
                if self.use_reentrant is not None
                else block(x)
            )
        return x


def train_checkpointed(use_reentrant):
    torch.manual_seed(0)
    model = Checkpointed(use_reentrant)
    training = ShardedTraining(model, lm.Muon(model, lr=0.05))
    for number in range(4):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number), requires_grad=True)
        training.optimizer.zero_grad()
        training.backward(training(x).square().mean())
        training.optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    expected = run_processes(2, train_checkpointed, None)[0]
    for weights in run_processes(2, train_checkpointed, use_reentrant):
        assert all(torch.equal(found, wanted) for found, wanted in zip(weights, expected, strict=True))


def reads_out_of_sight():
    for options in ({}, {"find_unused_parameters": True}):
        read_out_of_sight(options)


def read_out_of_sight(options):
    model = nn.Linear(3, 3)
    training = ShardedTraining(model, lm.Muon(model, lr=0.1), **options)
    x = torch.ones(2, 3)
    training.backward(training(x).sum())
    training.optimizer.step()
    training.optimizer.zero_grad()
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="Pass overlap=False"):
        training.backward(training(x).sum())
    training.optimizer.synchronize()
    assert not in_flight(model)


def a_lost_rank_is_no_stale_weight():
    model = nn.Linear(3, 3)
    training = ShardedTraining(model, lm.Muon(model, lr=0.1))
    training.backward(training(torch.ones(2, 3)).sum())
    training.optimizer.step()
    original = Gathering.wait

    def lose(self):
        raise RuntimeError("connection closed by peer")

    Gathering.wait = lose
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="connection closed"):
                model(torch.ones(2, 3))
    finally:
        Gathering.wait = original
    assert in_flight(model)
    model(torch.ones(2, 3))
    assert not in_flight(model)


def an_interrupted_wait_is_no_stale_weight():
    """The exception comes in the middle: some of the stage has been written, some has not."""
    model = nn.Linear(40, 40)
    training = ShardedTraining(model, lm.Muon(model, lr=0.1), Zero1("test", Zero1Options(gather_mb=8.0)))
    training.backward(training(torch.ones(2, 40)).sum())
    training.optimizer.step()
    original, calls = publish._write, []

    def interrupted(*arguments):
        original(*arguments)
        calls.append(1)
        raise KeyboardInterrupt

    publish._write = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            model.state_dict()
    finally:
        publish._write = original
    assert calls
    assert in_flight(model)
    for weight in model.state_dict().values():
        first = weight.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, weight)


def another_thread_waits_too():
    model = awkward_model()
    training = ShardedTraining(model, lm.Muon(model, lr=0.1), Zero1("test", Zero1Options(gather_mb=8.0)))
    step(training, token_batches(1, 12)[0])
    original, found, readers = Gathering.wait, [], []

    def slow(self):
        if not readers:
            read = threading.Thread(target=lambda: found.append(model.lm_head.weight.detach().clone()))
            readers.append(read)
            read.start()
            read.join(0.2)
            assert not found, "nothing has been written yet"
        return original(self)

    Gathering.wait = slow
    try:
        model.state_dict()
    finally:
        Gathering.wait = original
    readers[0].join()
    assert torch.equal(found[0], model.lm_head.weight)


def a_forked_process_reads_what_has_arrived():
    model = awkward_model()
    training = ShardedTraining(model, lm.Muon(model, lr=0.1))
    step(training, token_batches(1, 12)[0])
    assert in_flight(model)
    child = os.fork()
    if not child:
        os._exit(1 if in_flight(model) else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def evaluation_finds_everything_there():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    training = ShardedTraining(model, lm.Muon(model, lr=0.1))
    training.backward(training(torch.ones(2, 3)).sum())
    training.optimizer.step()
    assert in_flight(model)
    training.module.eval()
    seen = []
    model[0].register_forward_pre_hook(lambda *_: seen.append(in_flight(model)))
    training(torch.ones(2, 3))
    assert seen == [[]]


def a_parameter_of_the_same_class_is_one_like_any_other():
    model = nn.Linear(3, 3)
    training = ShardedTraining(model, lm.Muon(model, lr=0.1))
    training.backward(training(torch.ones(2, 3)).sum())
    training.optimizer.step()
    assert type(type(model.weight)(torch.zeros(2))) is nn.Parameter


def a_second_optimizer_has_owners_of_its_own():
    model, single = awkward_model(), awkward_model()
    zero1 = Zero1("test")
    everything_by_adamw = [{"params": list(model.named_parameters()), "algorithm": "adamw"}]
    training = ShardedTraining(model, lm.Muon(everything_by_adamw, lr=0.0), zero1)
    tokens = token_batches(1, 12)[0]
    for _ in range(2):  # DDP puts its buckets together anew after the first
        step(training, tokens)
    training.optimizer.zero_grad()
    training.optimizer = lm.Muon(model, lr=0.01)
    zero1.adopt([training.optimizer])
    reference = lm.Muon(single, lr=0.01)
    for _ in range(2):
        step(training, tokens)
        reference.zero_grad()
        single(tokens[:, :-1]).logsumexp(-1).mean().backward()
        reference.step()
    for found, wanted in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-4, atol=1e-5)


def unfreezing_is_an_error():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    training = ShardedTraining(model, lm.Muon(model, lr=0.1))
    model[0].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"'0\.weight'.*cannot be unfrozen"):
        training.backward(training(torch.ones(2, 3)).sum())


@pytest.mark.parametrize(
    "check",
    [
        a_lost_rank_is_no_stale_weight,
        an_interrupted_wait_is_no_stale_weight,
        another_thread_waits_too,
        a_forked_process_reads_what_has_arrived,
        evaluation_finds_everything_there,
        a_parameter_of_the_same_class_is_one_like_any_other,
        a_second_optimizer_has_owners_of_its_own,
        unfreezing_is_an_error,
        travels_and_lands,
        waits_where_it_was_told_to,
        reads_out_of_sight,
    ],
)
def test_in_flight(check):
    run_processes(2, check)


def ownership_without_module():
    """Fabric's setup_optimizers before setup_module, say: then the order is that of the names."""
    optimizer = lm.Muon(awkward_model())
    Zero1("test", Zero1Options(gather_mb=0.0005)).adopt([optimizer])
    stages = [list(stage) for stage in optimizer.partition.stages([])]
    assert sorted(name for stage in stages for name in stage) == sorted(optimizer.routes)
    assert len(stages) > 5


def test_order_of_stages():
    run_processes(2, ownership_without_module)
