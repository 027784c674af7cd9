"""A module that never heard of FSDP, sharded, with one process as the measure."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy, gelu

from lightning_muon.sharding.fsdp.blocks import find_blocks
from lightning_muon.sharding.fsdp.mixed_precision import unit_precision
from lightning_muon.sharding.fsdp.shard_module import drop_gathered, is_sharded, require_sharded, shard_module
from tests.processes import run_processes
from tests.references import relative_error

FULL = unit_precision("32-true")


class Block(nn.Module):
    def __init__(self, size=6, inner=13):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, inner), nn.Linear(inner, size)

    def forward(self, x, *, scale=1.0):
        return x + scale * self.down(gelu(self.up(self.norm(x))))


class Network(nn.Module):
    """Blocks between an embedding and a head; the buffer is computed, and not saved."""

    def __init__(self, tie=False, inner=13):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(Block(inner=inner) for _ in range(3))
        self.scales = Scales()
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 11, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer, scale in zip(self.layers, self.scales.values, strict=False):
            x = layer(x, scale=scale)
        return self.head(self.norm(x))

    def training_step(self, tokens):
        """As in a LightningModule: calls the module, and parts of it besides."""
        return cross_entropy(self(tokens).flatten(0, 1), tokens.flatten()) + self.norm.weight.square().mean()


class Scales(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("values", torch.empty(3), persistent=False)
        self.reset_parameters()

    def reset_parameters(self):
        self.values = torch.tensor([0.5, 1.0, 2.0])


def batches():
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 11, (12, 5), generator=generator) for _ in range(4)]


def mesh_of(shape):
    names = ("replicate", "shard")[-len(shape) :]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def shard(model, shape, **options):
    blocks = find_blocks(model, options.pop("wrap", None))
    mesh = options.pop("mesh", None) or mesh_of(shape)
    options.setdefault("precision", FULL)
    if options.pop("checkpoint", False):
        options["checkpointed"] = blocks.values()
    shard_module(model, mesh, blocks=blocks, **options)
    return model


def full_weights(model):
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def train(model, rank=0, world_size=1, evaluates=False):
    """Four steps of AdamW on this rank's part of each batch; the full weights afterwards."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for tokens in batches():
        optimizer.zero_grad()
        mine = tokens[rank::world_size]
        cross_entropy(model(mine).flatten(0, 1), mine.flatten()).backward()
        if evaluates:
            with torch.inference_mode():
                model.eval()
                losses.append(model(tokens).square().mean().item())
                model.train()
            drop_gathered(model)
        optimizer.step()
    return full_weights(model), losses


def one_process(seed=0, **arguments):
    torch.manual_seed(seed)
    return Network(**arguments)


def sharded_training(shape, is_meta, tie, options):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    with torch.device("meta" if is_meta else "cpu"):
        model = Network(tie=tie)
    names = [name for name, _ in model.named_parameters()]
    torch.manual_seed(rank)  # what a rank draws for itself must not matter
    if not is_meta:
        for param in model.parameters():
            param.data.add_(rank)
        model.scales.values.add_(rank)
    shard(model, shape, **options)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(isinstance(param, DTensor) for param in model.parameters())
    assert list(model.state_dict()) == list(Network(tie=tie).state_dict())
    start = full_weights(model)
    return start, *train(model, rank, world_size, evaluates=True)


@pytest.mark.parametrize(
    ("shape", "is_meta", "tie", "options"),
    [
        ((1,), False, False, {}),
        ((2,), False, False, {}),
        ((2,), True, True, {"checkpoint": True}),
        ((2,), False, True, {"wrap": (), "reshard_after_forward": True}),
        ((3,), True, False, {"wrap": {Block, nn.LayerNorm}}),
        ((4,), False, True, {"checkpoint": True, "reshard_after_forward": False}),
        ((2, 2), True, False, {"checkpoint": True}),
        ((4,), False, False, {"reshard_after_forward": 2}),
    ],
    ids=str,
)
def test_equals_one_process(shape, is_meta, tie, options):
    model = one_process(tie=tie)
    if is_meta:  # modules that draw again, in the order of modules(): what a tie discards is not drawn
        torch.manual_seed(0)
        for part in model.modules():
            if hasattr(part, "reset_parameters") and not (tie and part is model.head):
                part.reset_parameters()
    first = full_weights(model)
    expected, losses = train(model, evaluates=True)
    world_size = torch.Size(shape).numel()
    for start, end, their_losses in run_processes(world_size, sharded_training, shape, is_meta, tie, options):
        for name, weight in first.items():
            torch.testing.assert_close(start[name], weight, rtol=0, atol=0, msg=name)
        for name, weight in expected.items():
            assert relative_error(end[name], weight) <= 2e-5, name
        assert their_losses == pytest.approx(losses, rel=1e-4)


def test_meta_and_real_weights_are_the_same():
    """Without ties, with torch's own layers, the order of construction is that of ``modules()``."""
    torch.manual_seed(5)
    expected = full_weights(Network())
    for start in run_processes(2, meta_weights):
        for name, weight in expected.items():
            torch.testing.assert_close(start[name], weight, rtol=0, atol=0, msg=name)


def meta_weights():
    with torch.device("meta"):
        model = Network()
    torch.manual_seed(5)
    return full_weights(shard(model, (2,)))


def test_units():
    assert run_processes(2, units, None) == [["", "layers.0", "layers.1", "layers.2"]] * 2
    assert run_processes(2, units, ()) == [[""]] * 2


def units(wrap):
    model = shard(one_process(), (2,), wrap=wrap)
    assert is_sharded(model)
    return [name for name, part in model.named_modules() if isinstance(part, FSDPModule)]


def gathered_after_evaluation():
    """The hazard that `drop_gathered` is for: a forward without backward, then a step, then a forward."""
    model = shard(one_process(), (2,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tokens = batches()[0]
    cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    outputs = []
    for drops in (False, True):
        with torch.no_grad():
            model(tokens)
        if drops:
            drop_gathered(model)
            assert all(isinstance(param, DTensor) for param in model.parameters())
        optimizer.step()
        with torch.no_grad():
            outputs.append(model(tokens))
        drop_gathered(model)
        with torch.no_grad():
            outputs.append(model(tokens))
        drop_gathered(model)
    return outputs


def test_nothing_is_computed_with_weights_of_before_the_step():
    for stale, fresh, with_drop, reference in run_processes(2, gathered_after_evaluation):
        assert not torch.equal(stale, fresh)  # if this fails, torch no longer needs drop_gathered
        assert torch.equal(with_drop, reference)


def step_method():
    model = shard(one_process(), (2,))
    for name in ("training_step",):
        register_fsdp_forward_method(model, name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for tokens in batches():
        optimizer.zero_grad()
        model.training_step(tokens[dist.get_rank() :: 2]).backward()
        optimizer.step()
        with torch.no_grad():
            model.training_step(tokens)
        drop_gathered(model)
    return full_weights(model)


def test_a_method_that_calls_the_module_and_parts_of_it():
    model = one_process()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for tokens in batches():
        optimizer.zero_grad()
        model.training_step(tokens).backward()
        optimizer.step()
    expected = full_weights(model)
    for result in run_processes(2, step_method):
        for name, weight in expected.items():
            assert relative_error(result[name], weight) <= 1e-5, name


def with_tensor_parallelism(is_meta):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    rank = mesh["data_parallel"].get_local_rank()
    torch.manual_seed(0)
    with torch.device("meta" if is_meta else "cpu"):
        model = Network(inner=12)
    if not is_meta:
        for param in model.parameters():
            param.data.add_(rank)
    for block in model.layers:
        parallelize_module(block, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    torch.manual_seed(0)
    shard(model, None, mesh=mesh["data_parallel"])
    start = full_weights(model)
    return start, *train(model, rank, 2)


@pytest.mark.parametrize("is_meta", [False, True])
def test_tensor_parallelism(is_meta):
    model = one_process(inner=12)  # torch's parallel layers need even pieces
    first = full_weights(model)
    for start, end, _ in run_processes(4, with_tensor_parallelism, is_meta):
        with torch.no_grad():
            for name, param in model.named_parameters():
                if is_meta:  # torch draws pieces of a random tensor in its own way
                    assert not torch.equal(start[name], torch.zeros_like(param)) or "bias" in name
                    param.copy_(start[name])
                else:
                    torch.testing.assert_close(start[name], first[name], rtol=0, atol=0, msg=name)
        expected, _ = train(copy.deepcopy(model))
        for name, weight in expected.items():
            assert relative_error(end[name], weight) <= 2e-5, name


full_elements = []


class Counting(nn.Linear):
    """Notes how many elements of the whole model are whole on this rank while it gets its values."""

    model = None

    def reset_parameters(self):
        super().reset_parameters()
        if Counting.model is not None:
            params = Counting.model.parameters()
            full_elements.append(sum(p.numel() for p in params if not isinstance(p, DTensor) and not p.is_meta))


def meta_memory():
    full_elements.clear()
    with torch.device("meta"):
        Counting.model = None
        model = nn.Sequential(Counting(4, 5), *(nn.Sequential(Counting(5, 9), Counting(9, 5)) for _ in range(6)))
    Counting.model = model
    shard(model, (2,), wrap=lambda name, part: type(part) is nn.Sequential)
    return list(full_elements)


def test_one_block_at_a_time_is_whole():
    stem, up, down = 4 * 5 + 5, 5 * 9 + 9, 9 * 5 + 5
    assert run_processes(2, meta_memory) == [[stem, *[stem + up, stem + up + down] * 6]] * 2


def errors():
    """The messages that rank 0 sees; none of these may communicate, so a single rank may fail alone."""
    messages = []

    def attempt(change=lambda model: None, **options):
        model = one_process(tie=options.pop("tie", False))
        change(model)
        try:
            shard(model, (2,), **options)
        except (TypeError, ValueError) as error:
            assert not is_sharded(model)
            messages.append(f"{type(error).__name__}: {error}")
        else:
            messages.append("no error")

    def replace(path, value):
        def change(model):
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, value(model))

        return change

    attempt(
        replace(
            "layers",
            lambda model: nn.ModuleList([FullyShardedDataParallel(Block(), device_id=torch.device("cpu")), Block()]),
        )
    )
    attempt(tie=True, wrap={nn.Embedding})
    attempt(replace("layers.1.up.weight", lambda model: model.layers[0].up.weight))
    attempt(replace("layers.1.gain", lambda model: nn.Parameter(torch.tensor(1.0))))
    attempt(replace("layers.1.up.weight", lambda model: nn.Parameter(torch.randn(6, 13).T)))
    attempt(replace("layers.1.up.weight", lambda model: nn.Parameter(torch.randn(13, 6).to_sparse())))
    attempt(replace("layers.1.up.weight", lambda model: nn.Parameter(torch.randn(13, 6).bfloat16())))
    attempt(replace("embed", lambda model: nn.Embedding(11, 6, sparse=True)))
    attempt(replace("head", lambda model: nn.LazyLinear(11)))
    attempt(replace("layers.1.lora", lambda model: NoReset(torch.device("meta"))))
    return messages


class NoReset(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, device=device))


def test_errors():
    expected = [
        "TypeError: muon_fsdp shards modules itself, by FSDP2, and found layers.0 wrapped in FullyShardedDataParallel",
        "ValueError: embed.weight and head.weight are one parameter in two units, embed and what is in no block",
        "ValueError: layers.0.up.weight and layers.1.up.weight are one parameter in two units, layers.0 and layers.1",
        "ValueError: muon_fsdp cannot shard layers.1.gain, which is a scalar",
        "ValueError: muon_fsdp cannot shard layers.1.up.weight, which is not contiguous",
        "ValueError: muon_fsdp cannot shard layers.1.up.weight, which has the layout torch.sparse_coo",
        "ValueError: muon_fsdp needs one dtype for all trainable parameters of a unit, and in layers.1",
        "ValueError: muon_fsdp cannot reduce sparse gradients; build embed with sparse=False",
        "ValueError: muon_fsdp cannot shard head.weight, which has no shape yet",
        "TypeError: NoReset (layers.1.lora) has weight on the meta device and no reset_parameters()",
    ]
    for found in run_processes(2, errors):
        assert len(found) == len(expected)
        for message, start in zip(found, expected, strict=True):
            assert message.startswith(start), message


def left_out():
    model = one_process()
    for block in model.layers:
        fully_shard(block, mesh=mesh_of((2,)))
    assert is_sharded(model)
    with pytest.raises(ValueError, match=r"not sharded: embed\.weight, norm\.weight, norm\.bias, head\.weight\. Call"):
        require_sharded(model)
    for part in (model.embed, model.norm, model.head):
        part.requires_grad_(False)
    require_sharded(model)


def test_a_module_sharded_by_its_user_must_be_sharded_whole():
    run_processes(2, left_out)


def compiled_training(way, precision, checkpoint, fullgraph=False):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = one_process()
    for index, block in enumerate(model.layers):
        if way == "in place":
            block.compile(backend="aot_eager")
        elif way == "around":
            model.layers[index] = torch.compile(block, backend="aot_eager", fullgraph=fullgraph)
    shard(model, (world_size,), precision=unit_precision(precision), checkpoint=checkpoint)
    assert len([part for part in model.layers if isinstance(part, FSDPModule)]) == 3
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        weights, losses = train(model, rank, world_size, evaluates=True)
    # the groups of norms break the graph, and torch compiles nothing of a checkpoint with a break inside
    compiles = way == "around" or (way == "in place" and not (checkpoint and precision == "bf16-mixed"))
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compiles
    return {name.replace("_orig_mod.", ""): weight for name, weight in weights.items()}, losses


@pytest.mark.parametrize("way", ["in place", "around"])
@pytest.mark.parametrize(("precision", "checkpoint"), [("32-true", False), ("32-true", True), ("bf16-mixed", True)])
def test_compiled_blocks(way, precision, checkpoint):
    expected, losses = run_processes(2, compiled_training, "no", precision, checkpoint)[0]
    for weights, their_losses in run_processes(2, compiled_training, way, precision, checkpoint):
        for name, weight in expected.items():
            assert relative_error(weights[name], weight) <= (1e-2 if precision == "bf16-mixed" else 2e-5), name
        assert their_losses == pytest.approx(losses, rel=1e-2 if precision == "bf16-mixed" else 1e-4)
