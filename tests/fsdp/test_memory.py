"""What a rank holds under FSDP2: a part of everything, and beside it what a few stages take."""

import pytest
import torch
import torch.distributed as dist

import lightning_muon as lm
from benchmarks.fsdp_memory import Held, measure
from lightning_muon.local import local
from lightning_muon.sharding.fsdp.all_to_all import AllToAll
from tests.distributed.test_injected import SHAPES, Injected, gradients
from tests.fsdp.layouts import adopt, fsdp, shard_like
from tests.processes import run_processes

SIZE = 64  # rows and columns
MATRIX_BYTES = 4 * SIZE * SIZE
PER_STAGE = 8  # matrices


def bytes_of(tensors):
    return sum(local(tensor).numel() * local(tensor).element_size() for tensor in tensors)


def sharded(shapes, **exchange):
    model = fsdp(Injected(shapes))
    optimizer = lm.Muon(model, lr=0.02, orthogonalization_dtype=torch.float32)
    adopt(optimizer, model, **exchange)

    def step(seed):
        wanted = gradients(shapes, seed)
        for name, param in model.named_parameters():
            param.grad = shard_like(wanted[name], param)
        del wanted
        optimizer.step()

    return model, optimizer, step


def bytes_held(shapes):
    model, optimizer, step = sharded(shapes)
    step(0)
    params = list(model.parameters())
    by_adamw = [p for name, p in optimizer.named_parameters() if optimizer.routes[name].algorithm == "adamw"]
    grads = bytes_of(param.grad for param in params)
    return bytes_of(params), grads, optimizer.local_state_bytes(), bytes_of(by_adamw)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_weights_gradients_and_state_are_one_nth_up_to_rows(world_size):
    """FSDP2 shares rows, or what the first dimension is, as evenly as they can be shared from the front."""
    numels = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    rows = {name: shape[0] for name, shape in SHAPES.items()}
    total = 4 * sum(numels.values())
    largest = 4 * sum(-(-rows[name] // world_size) * (numels[name] // rows[name]) for name in SHAPES)
    ranks = run_processes(world_size, bytes_held, SHAPES)
    assert sum(weights for weights, *_ in ranks) == total
    assert ranks[0][0] == largest  # the first rank has what is left over of each
    for weights, grads, state, by_adamw in ranks:
        assert grads == weights <= largest
        assert state == weights + by_adamw  # momentum for Muon's, two averages for AdamW's


def extra_bytes(num_matrices, dtype):
    """The most that a step holds beside weights, gradients and state; and messages alone."""
    shapes = {f"matrix{number}": (SIZE, SIZE) for number in range(num_matrices)}
    stage_mb = PER_STAGE * MATRIX_BYTES / dist.get_world_size() / 2**20
    travelling, most, original = {}, [0], (AllToAll.__init__, AllToAll.wait)

    def start(self, *args):
        original[0](self, *args)
        received = (part for parts in self._received for part in parts)
        travelling[self] = bytes_of(self._sent) + bytes_of(received)
        most[0] = max(most[0], sum(travelling.values()))

    def wait(self):
        travelling.pop(self)
        return original[1](self)

    with Held() as held:
        _, optimizer, step = sharded(shapes, exchange_mb=stage_mb, exchange_dtype=dtype)
        step(0)
        hook = optimizer.register_step_pre_hook(lambda *_: setattr(held, "phase", "update"))
        AllToAll.__init__, AllToAll.wait = start, wait
        try:
            step(1)
        finally:
            AllToAll.__init__, AllToAll.wait = original
            hook.remove()
    assert not travelling
    weights = num_matrices * MATRIX_BYTES // dist.get_world_size()
    return held.peaks["update"] - 3 * weights, most[0]


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_holds_a_few_stages_however_many_matrices_there_are(world_size):
    stage = PER_STAGE * MATRIX_BYTES // world_size
    for few, many in zip(
        run_processes(world_size, extra_bytes, 4 * PER_STAGE, torch.float32),
        run_processes(world_size, extra_bytes, 16 * PER_STAGE, torch.float32),
        strict=True,
    ):
        assert many[1] == few[1] <= 3 * 2 * stage  # one stage on its way to owners, two on their way back; both ways
        # Messages, what is fed and the iteration's working memory, 12 or 13 stages; gloo's threads may keep a message
        # for a moment longer. All 16 stages at once would take five times as much.
        assert max(many[0], few[0]) <= 20 * stage


def test_messages_in_bfloat16_take_half():
    for wide, narrow in zip(
        run_processes(2, extra_bytes, 4 * PER_STAGE, torch.float32),
        run_processes(2, extra_bytes, 4 * PER_STAGE, torch.bfloat16),
        strict=True,
    ):
        assert 2 * narrow[1] == wide[1]


def test_the_benchmark_measures_what_strategies_hold():
    dim, depth = 64, 2
    whole = 4 * depth * (12 * dim * dim + 2 * dim)
    for sharded_weights in run_processes(2, measure, "muon_fsdp", dim, depth):
        assert sharded_weights["whole"] == whole
        assert sharded_weights["weights"] == sharded_weights["gradients"] == whole // 2
        assert sharded_weights["state"] == whole // 2 + 4 * depth * dim  # the norms' vectors are AdamW's
        parts = sharded_weights["weights"] + sharded_weights["gradients"] + sharded_weights["state"]
        assert min(sharded_weights["backward"], sharded_weights["update"]) >= parts - sharded_weights["gradients"]
    for replicated in run_processes(2, measure, "muon_zero1", dim, depth):
        assert replicated["weights"] == replicated["gradients"] == whole
