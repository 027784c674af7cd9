"""Models of others, none of which heard of FSDP, sharded by default; one process has the same gradients."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM
from lightning_muon.sharding.fsdp.blocks import find_blocks
from lightning_muon.sharding.fsdp.missing import MissingFSDPGradients
from lightning_muon.sharding.fsdp.mixed_precision import unit_precision
from lightning_muon.sharding.fsdp.shard_module import drop_gathered, shard_module
from tests.processes import run_processes
from tests.references import relative_error

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
SMALL["use_cache"] = False  # a cache of keys would be filled once more when activations are computed again
EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}


class Encoder(nn.Module):
    """torch's own, which looks at its layers' weights to choose a fast way in evaluation."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True), 2)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens), src_key_padding_mask=torch.zeros_like(tokens).bool()))


def llama():
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True))


def deepseek():
    config = DeepseekV3Config(**SMALL, **EXPERTS, **LATENT, num_key_value_heads=2, first_k_dense_replace=1)
    return DeepseekV3ForCausalLM(config)


def moe_lm():
    return MoELM(ModelConfig(num_hidden_layers=3))


def loss_of(model, tokens):
    output = model(tokens[:, :-1])
    logits = getattr(output, "logits", output)
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), logits


def gradients(build, sharded):
    """Averaged gradients, and logits in evaluation."""
    torch.manual_seed(0)
    model, tokens = build(), torch.randint(0, 64, (4, 17))
    mine = tokens
    if sharded:
        blocks = find_blocks(model)
        assert len(blocks) >= 2
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        options = {"precision": unit_precision("32-true"), "checkpointed": blocks.values()}
        shard_module(model, mesh, blocks=blocks, **options)
        mine = tokens[dist.get_rank() :: dist.get_world_size()]
        missing = MissingFSDPGradients("zero")
        missing.watch(model)
    names = {param: name for name, param in model.named_parameters()}
    model.train()
    loss_of(model, mine)[0].backward()
    if sharded:
        missing.resolve(names)
    model.eval()
    with torch.inference_mode():
        logits = loss_of(model, tokens)[1].clone()
    if sharded:
        drop_gathered(model)
    grads = {name: param.grad for param, name in names.items() if param.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}, logits


@pytest.mark.parametrize("build", [llama, deepseek, moe_lm, Encoder])
def test_gradients_of_one_process(build):
    expected, their_logits = gradients(build, False)
    for grads, logits in run_processes(2, gradients, build, True):
        assert grads.keys() == expected.keys()
        for name, grad in expected.items():
            assert relative_error(grads[name], grad) <= 2e-5, name
        assert relative_error(logits, their_logits) <= 1e-5
