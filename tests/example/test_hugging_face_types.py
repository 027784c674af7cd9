"""Every type of causal language model that `transformers` has: routed without a rule."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import lightning_muon as lm

transformers = pytest.importorskip("transformers")

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

NEEDS_A_RULE = {"xlnet"}
# A default configuration of these makes no model: what becomes of theirs is not known.
NOT_BUILT = {
    *("cohere_compass_text", "dbrx", "dots1", "gemma3n", "gemma3n_text", "gemma4_assistant"),
    *("gemma4_unified_assistant", "hunyuan_v1_dense", "hunyuan_v1_moe", "lfm2_moe", "ministral", "musicgen"),
    *("musicgen_melody", "nemotron", "qwen4_exp", "qwen4_exp_text", "reformer", "zamba"),
}
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers")
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")


def with_defaults(kind: str, num_layers: int = 4) -> Any | None:
    """The model of a type's default configuration with few layers, on the meta device; ``None`` where a default
    configuration makes no model."""
    try:
        config = transformers.AutoConfig.for_model(kind)
        for key in (*_LAYERS, *_KINDS):
            value = getattr(config, key, None)
            with contextlib.suppress(Exception):  # some are computed
                if isinstance(value, int) and value > num_layers:
                    setattr(config, key, num_layers)
                elif isinstance(value, list):
                    setattr(config, key, value[:num_layers])
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except Exception:  # of any kind: transformers checks each type of config in its own way
        return None


def test_every_type_is_routed_without_a_rule() -> None:
    routed, refused, absent, unsure = [], set(), set(), {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model = with_defaults(kind)
        if model is None:
            absent.add(kind)
            continue
        try:
            routes = lm.Muon(model).routes
        except ValueError:
            refused.add(kind)
            continue
        routed.append(kind)
        unsure |= {f"{kind} {name}": r.rule for name, r in routes.items() if "unknown" in r.rule}
    assert refused <= NEEDS_A_RULE
    assert not unsure
    assert absent <= NOT_BUILT
    assert len(routed) >= 170  # as docs/hugging-face.md says
