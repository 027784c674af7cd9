"""Moonlight-16B-A3B's published configuration and key list, without its weights."""

from __future__ import annotations

import pytest
import torch

from examples.moe_lm.hugging_face.configuration import from_hugging_face, to_hugging_face
from examples.moe_lm.hugging_face.convert import empty_model
from examples.moe_lm.hugging_face.keys import check_keys, parts_of

pytest.importorskip("transformers")

from tests.example.deepseek import MOONLIGHT, published_keys


def test_moonlights_configuration_and_every_key_of_it() -> None:
    config = from_hugging_face(MOONLIGHT)
    total, active = config.num_parameters(embeddings=False)
    assert (total, active) == (15_289_019_904, 2_243_685_888)  # 15.289 and, without norms and biases, 2.2436 billion
    assert (config.q_lora_rank, config.max_seq_len, config.rope_theta) == (None, 8192, 50_000.0)
    model = empty_model(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters().total

    published = published_keys(config)
    assert len(published) == 3 + 27 * 7 + 3 + 26 * (64 * 3 + 3 + 2)
    parts = [
        part
        for name, tensor in model.state_dict().items()
        for part in parts_of(name, tuple(tensor.shape), published.keys())
    ]
    used = [part.key for part in parts]
    assert sorted(used) == sorted(published)  # each once
    check_keys(parts, published, ())


def test_moonlights_configuration_comes_back_as_it_was() -> None:
    written = to_hugging_face(from_hugging_face(MOONLIGHT), torch.bfloat16, MOONLIGHT, keep_code=True)
    assert written == MOONLIGHT
    assert list(written) == list(MOONLIGHT)
