"""The shapes of well-known models, on the meta device: names and sizes, no memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import lightning_muon as lm
from examples.moe_lm.model import MoELM
from lightning_muon.planning.models import from_configs

__all__ = ["MODELS", "ModelShapes"]

_CONFIGS = Path(__file__).parents[1] / "examples" / "moe_lm" / "configs"


@dataclass(frozen=True)
class ModelShapes:
    """A model as the optimizer sees it.

    Attributes:
        shapes: Shape of every parameter, by name.
        active_parameters: Parameters that a token passes through, without the embedding that it is looked up in.
    """

    shapes: dict[str, tuple[int, ...]]
    active_parameters: int

    def optimizer(self, dtype: torch.dtype) -> lm.Muon:
        """``lm.Muon`` of the model, with parameters of this dtype on the meta device."""
        return lm.Muon(
            [
                (name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))
                for name, shape in self.shapes.items()
            ]
        )


def _llama(num_layers: int, hidden: int, key_value: int, intermediate: int, vocabulary: int) -> ModelShapes:
    """Llama 2 (arXiv 2307.09288, and the config.json files beside its weights)."""
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for number in range(num_layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    return ModelShapes(shapes, sum(torch.Size(shape).numel() for shape in shapes.values()) - vocabulary * hidden)


def _moonlight() -> ModelShapes:
    """Moonlight-16B-A3B, from the example's configuration."""
    module = from_configs("examples.moe_lm.model.MoELM", [_CONFIGS / "small.yaml", _CONFIGS / "moonlight_16b_a3b.yaml"])
    assert isinstance(module, MoELM)
    config = module.config
    return ModelShapes(
        {name: tuple(param.shape) for name, param in module.named_parameters()},
        config.num_parameters().active - config.vocab_size * config.hidden_size,
    )


MODELS = {
    "Llama-7B": lambda: _llama(32, 4096, 4096, 11008, 32000),
    "Llama-70B": lambda: _llama(80, 8192, 1024, 28672, 32000),
    "Moonlight-16B": _moonlight,
}
