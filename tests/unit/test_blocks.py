"""Which modules are sharded as units of their own."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM
from lightning_muon.sharding.fsdp.blocks import describe_blocks, find_blocks

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


class Block(nn.Module):
    def __init__(self, size=8):
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)


class Raw(nn.Module):
    """A user's block without modules inside."""

    def __init__(self, size=8):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, size))


class Chain(nn.Sequential):
    """A list that is a class of its own is called as one."""


class Experts(Block):
    def __init__(self, list_name="experts"):
        super().__init__()
        setattr(self, list_name, nn.ModuleList(Raw(40) for _ in range(4)))


class Holder(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def names(module, wrap=None):
    return list(find_blocks(module, wrap))


def layers(prefix, count):
    return [f"{prefix}.{index}" for index in range(count)]


def on_meta(build, *args, **kwargs):
    with torch.device("meta"):
        return build(*args, **kwargs)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: MoELM(ModelConfig(num_hidden_layers=3)), layers("model.layers", 3)),
        (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=3)), layers("model.layers", 3)),
        (
            lambda: DeepseekV3ForCausalLM(
                DeepseekV3Config(**SMALL, num_hidden_layers=3, n_routed_experts=8, first_k_dense_replace=1)
            ),
            layers("model.layers", 3),
        ),
        (lambda: BertModel(BertConfig(**SMALL, num_hidden_layers=2)), layers("encoder.layer", 2)),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
            ),
            [*layers("encoder.block", 2), *layers("decoder.block", 2)],
        ),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2), layers("layers", 2)),
        (
            lambda: nn.Transformer(8, 2, 2, 3, 16),
            [*layers("encoder.layers", 2), *layers("decoder.layers", 3)],
        ),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), []),
        (lambda: nn.Sequential(nn.Embedding(9, 8), Block(), Block(), nn.LayerNorm(8), nn.Linear(8, 9)), ["1", "2"]),
        (lambda: Holder(body=nn.ModuleList([Raw(), Raw(), Block()])), layers("body", 2)),
        (lambda: Holder(body=nn.ModuleDict({"0": Block(), "1": Block()})), layers("body", 2)),
        (lambda: Holder(heads=nn.ModuleDict({"cats": Block(), "dogs": Block()})), []),
        (lambda: nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block())), ["0.0", "0.1", "1.0"]),
        (lambda: nn.ModuleList([Experts(), Experts()]), ["0", "1"]),
        (lambda: nn.ModuleList([Experts("parts"), Experts("parts")]), ["0", "1"]),
        (lambda: nn.Sequential(Chain(Raw()), Chain(Raw())), ["0", "1"]),
        (lambda: Experts(), []),
        (lambda: nn.Linear(3, 3), []),
        (lambda: nn.ModuleList([Block()]), []),
        (lambda: nn.ModuleList([nn.Identity(), nn.ReLU()]), []),
        (
            lambda: Holder(body=nn.ModuleList([Block(), Block()]), tiny=nn.ModuleList([Raw(2), Raw(2)])),
            layers("body", 2),
        ),
        (lambda: nn.ModuleList([torch.compile(Block()), torch.compile(Block())]), ["0", "1"]),
    ],
)
def test_the_default(build, expected):
    assert names(on_meta(build)) == expected


def test_one_object_in_several_places_is_one_block():
    block = Block()
    assert names(nn.ModuleList([block, block])) == []
    assert names(nn.ModuleList([block, Block(), block])) == ["0", "1"]


def test_classes():
    model = Holder(body=nn.ModuleList([Experts("parts"), Block()]), other=Raw(3))
    assert names(model, {Block}) == ["body.0", "body.1"]
    assert names(model, {Experts}) == ["body.0"]
    assert names(model, [Experts, Raw]) == ["body.0", *layers("body.0.parts", 4), "other"]
    assert names(model, ()) == []
    assert names(nn.ModuleList([torch.compile(Block())]), {Block}) == ["0"]  # the compiled module, not the one inside


def test_a_function():
    model = Holder(body=nn.ModuleList([Block(), Block()]))
    assert names(model, lambda name, part: name.endswith("1")) == ["body.1"]
    assert names(model, lambda name, part: isinstance(part, nn.Linear) and name.endswith("up")) == [
        "body.0.up",
        "body.1.up",
    ]


def test_what_cannot_be_chosen():
    model = Holder(body=nn.ModuleList([Block(), Block()]))
    with pytest.raises(ValueError, match=r"No module is a Raw\. The classes there are: ModuleList, Block, Linear\."):
        find_blocks(model, {Raw})
    with pytest.raises(ValueError, match=r"picked no module\. The classes there are: ModuleList, Block, Linear\."):
        find_blocks(model, lambda name, part: name == "")
    with pytest.raises(ValueError, match=r"body is a ModuleList, which is never called"):
        find_blocks(model, {nn.ModuleList})
    with pytest.raises(TypeError, match="'Block'"):
        find_blocks(model, {"Block"})
    with pytest.raises(TypeError, match="wrap must be"):
        find_blocks(model, 3)
    assert names(model, Block) == layers("body", 2)  # one class


def test_the_sentence():
    model = Holder(body=nn.ModuleList([Raw(), Raw(), Block(), Block(), Block()]))
    assert describe_blocks(find_blocks(model), "muon_fsdp") == (
        "muon_fsdp shards 2 Raw (body.0 … body.1), 3 Block (body.2 … body.4) and the rest as one unit."
    )
    one = describe_blocks(find_blocks(model, lambda name, _: name == "body.2"), "muon_fsdp")
    assert one == "muon_fsdp shards 1 Block (body.2) and the rest as one unit."
    assert "as one unit" in describe_blocks({}, "muon_fsdp")
