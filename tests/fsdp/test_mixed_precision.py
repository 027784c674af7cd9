"""Mixed precision under FSDP2, with DistributedDataParallel and the same plugin of Lightning as the measure."""

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.precision import HalfPrecision, MixedPrecision, Precision
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from lightning_muon.sharding.fsdp.blocks import find_blocks
from lightning_muon.sharding.fsdp.mixed_precision import UnitPrecision, unit_precision
from lightning_muon.sharding.fsdp.shard_module import drop_gathered, shard_module
from lightning_muon.sharding.precision import share_overflows
from tests.processes import run_processes
from tests.references import relative_error

TORCHS_OWN = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(19, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 19)
        for name, param in self.named_parameters():
            if "norm" in name:
                nn.init.uniform_(param, 0.3, 0.7)  # what 16 bits cannot hold, unlike 1

    def forward(self, tokens):
        return self.head(self.norm(self.encoder(self.embed(tokens))))


def plugin(precision):
    if precision == "bf16-mixed":
        return MixedPrecision(precision, "cpu")
    if precision == "16-mixed":
        return MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    return HalfPrecision(precision) if precision == "bf16-true" else Precision()


def train(sharded, precision, policy=None, overflows=None, checkpointed=False, num_steps=3):
    """Each step's averaged gradients, as they are before the step, and the weights after it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    precision_plugin = plugin(precision)
    module = model = precision_plugin.convert_module(Transformer())
    if sharded:
        blocks = find_blocks(module)
        shard_module(
            module,
            init_device_mesh("cpu", (world_size,)),
            blocks=blocks,
            precision=unit_precision(precision, policy),
            checkpointed=blocks.values() if checkpointed else (),
        )
        share_overflows(precision_plugin, "test")
    else:
        model = DistributedDataParallel(module)
    scaler = getattr(precision_plugin, "scaler", None)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    gradients, weights = [], []
    for step in range(num_steps):
        optimizer.zero_grad()
        tokens = torch.randint(0, 19, (4, 9), generator=torch.Generator().manual_seed(10 * step + rank))
        with precision_plugin.forward_context():
            loss = cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())
        (scaler.scale(loss) if scaler else loss).backward()
        with torch.no_grad():
            if overflows == (rank, step):
                local(module.head.weight.grad)[0] = torch.inf
        if scaler:
            scaler.unscale_(optimizer)
        gradients.append({name: whole(param.grad) for name, param in module.named_parameters()})
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        weights.append({name: whole(param) for name, param in module.named_parameters()})
        with torch.inference_mode(), precision_plugin.forward_context():
            assert model.eval()(tokens).isfinite().all()
        model.train()
        if sharded:
            drop_gathered(module)
    return gradients, weights, scaler.get_scale() if scaler else None


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def difference(found, expected):
    """Of all gradients together."""
    return relative_error(
        *(torch.cat([grad.float().flatten() for grad in grads.values()]) for grads in (found, expected))
    )


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_computes_what_ddp_computes(precision, checkpointed):
    expected, *_ = run_processes(2, train, False, precision)[0]
    for gradients, *_ in run_processes(2, train, True, precision, None, None, checkpointed):
        for found, reference in zip(gradients, expected, strict=True):
            assert {grad.dtype for grad in found.values()} == {grad.dtype for grad in reference.values()}
            assert difference(found, reference) <= (1e-2 if precision == "bf16-true" else 1e-6)


def test_torchs_own_policy_is_not_what_ddp_computes():
    autocast, *_ = run_processes(2, train, False, "bf16-mixed")[0]
    own, *_ = run_processes(2, train, True, "bf16-mixed", TORCHS_OWN)[0]
    assert 1e-3 < difference(own[0], autocast[0]) < 0.1


def outside_autocast():
    module = Transformer()
    blocks = find_blocks(module)
    precision = unit_precision("bf16-mixed")
    shard_module(
        module, init_device_mesh("cpu", (2,)), blocks=blocks, precision=precision, checkpointed=blocks.values()
    )
    tokens = torch.arange(10).view(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = module(tokens)
    outside = module(tokens)
    outside.square().mean().backward()
    drop_gathered(module)
    return inside.detach(), outside.detach()


def test_blocks_can_be_called_outside_autocast():
    """There what is in no block computes in float32, as it does without FSDP2."""
    for inside, outside in run_processes(2, outside_autocast):
        assert (inside.dtype, outside.dtype) == (torch.bfloat16, torch.float32)
        assert relative_error(outside, inside) < 0.02


@pytest.mark.parametrize("overflowing_rank", [0, 1])
def test_an_overflow_at_one_rank_skips_the_step_on_all(overflowing_rank):
    for _, weights, scale in run_processes(2, train, True, "16-mixed", None, (overflowing_rank, 1)):
        assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())
        assert not any(torch.equal(weights[1][name], weight) for name, weight in weights[2].items())
        assert scale == 128.0


def gathered_dtypes(precision):
    module = Transformer()
    blocks = find_blocks(module)
    shard_module(module, init_device_mesh("cpu", (2,)), blocks=blocks, precision=unit_precision(precision))
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.unshard()
    return {name: param.dtype for name, param in module.named_parameters()}


def test_what_is_gathered_in_16_bits():
    dtypes = run_processes(2, gathered_dtypes, "bf16-mixed")[0]
    for name, dtype in dtypes.items():
        is_rounded = name.startswith("encoder.") and "norm" not in name
        assert dtype == (torch.bfloat16 if is_rounded else torch.float32), name


class Router(nn.Linear):
    """Its scores are computed in float32, whatever autocast does elsewhere."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.float(), self.weight.float())


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.up = Router(8, 8, bias=False), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))

    def forward(self, x):
        return x + self.up(x) * self.router(x).sigmoid()


def routed_gradients(full):
    torch.manual_seed(0)
    module = model = nn.Sequential(nn.Linear(8, 8), *(Gated() for _ in range(3)))
    if full is None:
        model = DistributedDataParallel(module)
    else:
        precision = unit_precision("bf16-mixed", full=full)
        shard_module(module, init_device_mesh("cpu", (2,)), blocks=find_blocks(module), precision=precision)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(4, 8)).square().mean()
    loss.backward()
    return {name: whole(param.grad) for name, param in module.named_parameters()}


def test_modules_in_full_precision():
    expected = run_processes(2, routed_gradients, None)[0]
    assert difference(run_processes(2, routed_gradients, ())[0], expected) > 1e-4
    for grads in run_processes(2, routed_gradients, {Router}):
        assert difference(grads, expected) <= 1e-6


class OddBlock(nn.Module):
    """Calls its norms as the name says."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first, self.second, self.up, self.down = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.up(self.first(x))
        if self.kind != "one unused":
            x = x + self.down(self.second(x))
        return x + self.up(self.first(x)) if self.kind == "one twice" else x


class OddModel(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.embed, self.layers = kind, nn.Embedding(9, 8), nn.ModuleList([OddBlock(kind), OddBlock(kind)])

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in [*self.layers] * (2 if self.kind == "blocks twice" else 1):
            x = layer(x)
        return x.float().square().mean()


def odd_gradients(kind, sharded, checkpointed, can_be_partial=True):
    model = OddModel(kind)
    if sharded:
        blocks = find_blocks(model)
        options = {"precision": unit_precision("bf16-mixed"), "checkpointed": blocks.values() if checkpointed else ()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lightning_muon.sharding.fsdp.shard_module._groups_can_be_partial", can_be_partial)
            shard_module(model, init_device_mesh("cpu", (2,)), blocks=blocks, **options)
    for step in range(2):
        tokens = torch.arange(6).view(2, 3) + step
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens) + (model(tokens + 1) if kind == "two forwards" else 0)
        loss.backward()
    return {name: whole(param.grad) for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("can_be_partial", [True, False])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["one unused", "one twice", "blocks twice", "two forwards"])
def test_norms_that_run_oddly(kind, checkpointed, can_be_partial):
    expected = odd_gradients(kind, False, False)
    for grads in run_processes(2, odd_gradients, kind, True, checkpointed, can_be_partial):
        assert grads.keys() == expected.keys()
        assert difference(grads, expected) <= 1e-6


def test_policies():
    nothing = UnitPrecision(MixedPrecisionPolicy(), MixedPrecisionPolicy())
    for precision in ("32-true", "64-true", "bf16-true", "16-true"):
        assert unit_precision(precision) == nothing
    assert unit_precision("bf16-mixed", TORCHS_OWN) == UnitPrecision(TORCHS_OWN, TORCHS_OWN)
    assert unit_precision("16-mixed").blocks.param_dtype == torch.float16
    assert unit_precision("16-mixed").blocks.reduce_dtype == torch.float32
