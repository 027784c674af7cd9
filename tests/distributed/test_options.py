"""What can be chosen about the sharded step: each choice gives on several processes what it gives on one."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_ as torch_clip_grad_norm_

import lightning_muon as lm
from lightning_muon.sharding import collectives
from lightning_muon.sharding.clipping import clip_grad_norm_, grad_norms
from lightning_muon.sharding.zero1 import Zero1, Zero1Options
from tests.distributed.test_injected import SHAPES, Injected, gradients
from tests.processes import run_processes
from tests.references import relative_error
from tests.sharding import ShardedTraining, Training


def train(sharded, muon_options, options, dtype=torch.float32, idle=(), steps=8, max_norm=None):
    """Every rank has the same gradients, so that only what is shared out could differ."""
    model = Injected(SHAPES).to(dtype)
    optimizer = lm.Muon(model, lr=0.02, adamw_lr=0.01, orthogonalization_dtype=torch.float32, **muon_options)
    training = ShardedTraining(model, optimizer, options=options) if sharded else Training(model, optimizer)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        wanted = {name: gradient.to(dtype) for name, gradient in gradients(SHAPES, step).items()}
        if step >= 3:
            for expert in idle:
                wanted["experts"][expert] = 0
        training.backward(training(wanted))
        if max_norm is not None:
            norms.append(clip_grad_norm_(optimizer, max_norm, scope=(options or {}).get("clip_scope", "all")).item())
        optimizer.step()
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    if sharded:
        optimizer.consolidate_state_dict()
        if dist.get_rank():
            return weights, None, norms
    return weights, optimizer.state_dict(), norms


def assert_equal_to_one_process(world_size, *arguments, tolerance=1e-6):
    expected, state, norms = train(False, *arguments)
    results = run_processes(world_size, train, True, *arguments)
    for weights, _, found in results:
        assert all(relative_error(weights[name], weight) <= tolerance for name, weight in expected.items())
        assert found == pytest.approx(norms, rel=1e-6)
    for index, entries in state["state"].items():
        for key, value in entries.items():
            found = results[0][1]["state"][index][key]
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
    return expected


WORLD_SIZES = [1, 2, 3, 4]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("gather_mb", [1e-6, 8.0])
def test_stages(world_size, overlap, gather_mb):
    options = Zero1Options(overlap=overlap, gather_mb=gather_mb)
    results = run_processes(world_size, train_in_stages, options)
    expected, *_ = train(False, {}, {})
    for weights in results:
        assert all(relative_error(weights[name], weight) <= 1e-6 for name, weight in expected.items())


def train_in_small_messages(options):
    original, collectives.MESSAGE_BYTES = collectives.MESSAGE_BYTES, 256
    try:
        return train_in_stages(options)
    finally:
        collectives.MESSAGE_BYTES = original


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_many_messages(world_size):
    expected, *_ = train(False, {}, {})
    for weights in run_processes(world_size, train_in_small_messages, Zero1Options()):
        assert all(relative_error(weights[name], weight) <= 1e-6 for name, weight in expected.items())


def train_in_stages(options):
    model = Injected(SHAPES)
    optimizer = lm.Muon(model, lr=0.02, adamw_lr=0.01, orthogonalization_dtype=torch.float32)
    training = ShardedTraining(model, optimizer, Zero1("test", options))
    for step in range(8):
        optimizer.zero_grad()
        training.backward(training(gradients(SHAPES, step)))
        optimizer.step()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_master_weights(world_size):
    # 16-bit parameters agree to their last bit, or nearly always: 1e-3 is an eighth of it
    assert_equal_to_one_process(world_size, {"master_weights": True}, None, torch.bfloat16, tolerance=1e-3)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("policy", ["skip", "update"])
def test_idle_experts(world_size, policy):
    weights = assert_equal_to_one_process(world_size, {"idle_matrices": policy}, None, torch.float32, (0, 5))
    before, *_ = train(False, {"idle_matrices": policy}, None, steps=3)
    for expert in range(7):
        rests = torch.equal(weights["experts"][expert], before["experts"][expert])
        assert rests == (policy == "skip" and expert in (0, 5))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("scope", ["all", "adamw", "none"])
def test_clip_scope(world_size, scope):
    assert_equal_to_one_process(world_size, {}, {"clip_scope": scope}, torch.float32, (), 5, 3.0)


VECTORS = {"vector", "row", "column"}  # a matrix with one row is one, too


def norms_by_route():
    model = Injected(SHAPES)
    optimizer = lm.Muon(model)
    training = ShardedTraining(model, optimizer)
    training.backward(training(gradients(SHAPES, 0)))
    found = {which: norm.item() for which, norm in grad_norms(optimizer).items()}
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    owned = {name for name, p in model.named_parameters() if optimizer.local_gradients(name, p)}
    clip_grad_norm_(optimizer, 1e-3, scope="adamw")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p.grad, before[name])}
    assert changed == VECTORS & owned
    return found


def test_norms_are_those_of_each_route():
    model = Injected(SHAPES)
    model(gradients(SHAPES, 0)).backward()
    params = dict(model.named_parameters())
    expected = {
        "all": torch_clip_grad_norm_(params.values(), 1e9).item(),
        "adamw": torch_clip_grad_norm_([params[name] for name in VECTORS], 1e9).item(),
        "muon": torch_clip_grad_norm_([p for name, p in params.items() if name not in VECTORS], 1e9).item(),
    }
    for found in run_processes(3, norms_by_route):
        assert found == pytest.approx(expected, rel=1e-6)


EVERYTHING = {
    "several": SHAPES,
    "fewer matrices than ranks": {"a": (63, 63), "b": (5, 4)},
    "one matrix": {"a": (9, 7)},
    "no matrix": {"vector": (5,), "row": (1, 7), "column": (6, 1)},
}


def train_with_everything(sharded, shapes):
    """bfloat16 weights with float32 copies, an idle matrix, clipping, in many stages."""
    model = Injected(shapes).to(torch.bfloat16)
    options = {"missing_gradients": "skip", "clip_scope": "adamw"}
    optimizer = lm.Muon(model, lr=0.02, adamw_lr=0.01, orthogonalization_dtype=torch.float32, master_weights=True)
    training = ShardedTraining(model, optimizer, options=options) if sharded else Training(model, optimizer)
    for step in range(8):
        optimizer.zero_grad()
        wanted = {name: gradient.bfloat16() for name, gradient in gradients(shapes, step).items()}
        first = next(iter(wanted.values()))
        if step in (3, 4) and first.ndim == 2:
            first.zero_()
        training.backward(training(wanted))
        clip_grad_norm_(optimizer, 1.0, scope="adamw")
        optimizer.step()
    if sharded:
        optimizer.consolidate_state_dict()
    masters = {}
    if not sharded or dist.get_rank() == 0:
        state = optimizer.state_dict()
        for group in state["param_groups"]:
            for index, name in zip(group["params"], group["param_names"], strict=True):
                masters[name] = state["state"][index]["master_weight"]
    return masters, {name: param.detach().clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("which", EVERYTHING)
def test_all_options_together(world_size, which):
    expected, _ = train_with_everything(False, EVERYTHING[which])
    results = run_processes(world_size, train_with_everything, True, EVERYTHING[which])
    for name, master in expected.items():
        assert relative_error(results[0][0][name], master) <= 1e-6
        for _, weights in results:
            assert torch.equal(weights[name], results[0][0][name].bfloat16())


class Branches(nn.Module):
    """Two experts as modules of their own; a rank uses those it is told to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.experts = nn.Linear(6, 6), nn.ModuleList(nn.Linear(6, 5) for _ in range(3))

    def forward(self, x, used):
        x = torch.tanh(self.shared(x))
        return sum(self.experts[number](x).square().mean() for number in used)


# by step, which experts every rank uses; expert 2 is idle everywhere in step 1
USED = [[(0, 1, 2), (0, 1, 2)], [(0,), (0, 1)], [(2, 1), (0, 1, 2)], [(0, 1, 2), (0, 1, 2)]]


def train_with_missing(policy, accumulate=1, all_at_first=False):
    rank = dist.get_rank()
    model = Branches()
    training = ShardedTraining(model, lm.Muon(model, lr=0.05), options={"missing_gradients": policy})
    history = []
    for step, used in enumerate(USED):
        training.optimizer.zero_grad()
        for number in range(accumulate):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + number))
            training.module.require_backward_grad_sync = number == accumulate - 1
            now = (0, 1, 2) if all_at_first and number == 0 else used[rank]
            training.backward(training(x, now) / accumulate)
        lm.grad_norm(training.optimizer)  # asks as well, and changes nothing
        training.optimizer.step()
        history.append({name: param.detach().clone() for name, param in model.named_parameters()})
    return history


def reference_with_missing(policy):
    model = Branches()
    optimizer = lm.Muon(model, lr=0.05)
    history = []
    for step, used in enumerate(USED):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step))
        both = []
        for own in used:
            optimizer.zero_grad()
            model(x, own).backward()
            both.append([None if param.grad is None else param.grad.clone() for param in model.parameters()])
        for param, *found in zip(model.parameters(), *both, strict=True):
            present = [gradient for gradient in found if gradient is not None]
            is_partial = 0 < len(present) < 2
            param.grad = None if not present or (is_partial and policy == "skip") else sum(present) / 2
        optimizer.step()
        history.append({name: param.detach().clone() for name, param in model.named_parameters()})
    return history


@pytest.mark.parametrize("policy", ["zero", "skip"])
def test_gradients_on_some_ranks_only(policy):
    expected = reference_with_missing(policy)
    for history in run_processes(2, train_with_missing, policy):
        for found, wanted in zip(history, expected, strict=True):
            for name, weight in wanted.items():
                torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
    resting = [torch.equal(expected[1][f"experts.{e}.weight"], expected[0][f"experts.{e}.weight"]) for e in range(3)]
    assert resting == [False, policy == "skip", True]


def test_accumulated_gradients_count_as_present():
    zero, skip = (run_processes(2, train_with_missing, policy, 2)[0] for policy in ("zero", "skip"))
    assert torch.equal(zero[0]["experts.1.weight"], skip[0]["experts.1.weight"])
    assert not torch.equal(zero[1]["experts.1.weight"], skip[1]["experts.1.weight"])
    # used by all ranks in the first micro-batch, which is accumulated locally: then it is missing nowhere
    zero, skip = (run_processes(2, train_with_missing, policy, 2, True)[0] for policy in ("zero", "skip"))
    for found, wanted in zip(skip, zero, strict=True):
        assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def missing_is_an_error():
    with pytest.raises(RuntimeError, match=r"experts.1.weight \(on 1 of 2 ranks\).*missing_gradients='zero'"):
        train_with_missing("raise")


def missing_is_noticed_without_being_asked():
    """DDP would wait for ever; the rank that lacks the gradient says so, and names it."""
    model = Branches()
    training = ShardedTraining(model, lm.Muon(model, lr=0.05))
    training.backward(training(torch.ones(4, 6), (0, 1)))  # on all ranks, so that nobody waits here
    with pytest.raises(RuntimeError, match=r"experts\.2\.weight"):
        lm.grad_norm(training.optimizer)
    with pytest.raises(RuntimeError, match=r"experts\.2\.weight"):
        training.optimizer.step()


@pytest.mark.parametrize("check", [missing_is_an_error, missing_is_noticed_without_being_asked])
def test_missing_gradients(check):
    run_processes(2, check)


@pytest.mark.parametrize(
    "options", [{"gather_mb": 0}, {"missing_gradients": "ignore"}, {"clip_scope": "muon"}], ids=lambda o: next(iter(o))
)
@pytest.mark.parametrize("strategy", [lm.MuonZero1Strategy, lm.fabric.MuonZero1Strategy])
def test_options_out_of_range(strategy, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        strategy(**options)


def test_missing_gradients_need_ddp_to_look():
    with pytest.raises(ValueError, match="find_unused_parameters=True"):
        lm.MuonZero1Strategy(missing_gradients="zero", find_unused_parameters=False)
