"""The largest logit of each head, against one product after the other in float64."""

import math

import pytest
import torch

from lightning_muon.attention.logits import max_logits
from tests.attention_models import slow_max_logits


def tensors(heads=4, key_heads=2, queries=7, keys=7, batch=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    return make(batch, heads, queries, 5), make(batch, key_heads, keys, 5)


def assert_equal(found, expected, rel=1e-6):
    assert found.tolist() == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("chunk_elements", [1, 50, 4 * 7 * 3, 4 * 7 * 7 * 2, 1 << 24])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_chunk_and_group(chunk_elements, key_heads, is_causal):
    query, key = tensors(key_heads=key_heads)
    found = max_logits(query, key, is_causal=is_causal, chunk_elements=chunk_elements)
    assert found.shape == (4,)
    assert_equal(found, slow_max_logits(query, key, lambda b, h, i, j: j <= i or not is_causal))


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
@pytest.mark.parametrize("chunk_elements", [30, 1 << 24])
def test_causal_counts_from_the_first_position_as_torch_does(shape, chunk_elements):
    query, key = tensors(queries=shape[0], keys=shape[1])
    found = max_logits(query, key, is_causal=True, chunk_elements=chunk_elements)
    assert_equal(found, slow_max_logits(query, key, lambda b, h, i, j: j <= i))


@pytest.mark.parametrize("shape", [(7, 7), (3, 1, 7, 7), (1, 4, 1, 7), (3, 4, 7, 7)])
@pytest.mark.parametrize("chunk_elements", [60, 1 << 24])
def test_masks(shape, chunk_elements):
    query, key = tensors()
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.4
    whole = seen.expand(3, 4, 7, 7)
    expected = slow_max_logits(query, key, lambda b, h, i, j: whole[b, h, i, j])
    assert_equal(max_logits(query, key, attn_mask=seen, chunk_elements=chunk_elements), expected)
    for hidden in (-math.inf, torch.finfo(torch.float32).min, -1e4):
        additive = torch.where(seen, -3.0, hidden)  # a bias is no part of q·k
        assert_equal(max_logits(query, key, attn_mask=additive, chunk_elements=chunk_elements), expected)


def test_what_is_hidden_may_be_anything():
    query, key = tensors()
    expected = max_logits(query, key, is_causal=True)
    query, key = torch.cat([query, query[:, :, -1:]], 2), torch.cat([key, torch.full_like(key[:, :, :1], math.nan)], 2)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    mask[:, -1] = False
    assert_equal(max_logits(query, key, attn_mask=mask), expected.tolist())
    assert max_logits(query, key).isnan().all()
    assert max_logits(query, key, attn_mask=torch.zeros(8, 8, dtype=torch.bool)).tolist() == [-math.inf] * 4


def test_precision():
    query, key = tensors(dtype=torch.bfloat16)
    expected = slow_max_logits(query, key, lambda *_: True, scale=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = max_logits(query, key, scale=0.3)
    assert found.dtype == torch.float32
    assert_equal(found, expected)
    double = max_logits(query.double(), key.double(), scale=0.3)
    assert_equal(double, expected, rel=1e-14)


def test_other_shapes():
    query, key = tensors()
    assert_equal(max_logits(query[0], key[0]), max_logits(query[:1], key[:1]).tolist())
    folded = max_logits(query.reshape(3, 1, 4, 7, 5), key.reshape(3, 1, 2, 7, 5), is_causal=True)
    assert_equal(folded, max_logits(query, key, is_causal=True).tolist())
    assert max_logits(query[:0], key[:0]).tolist() == [-math.inf] * 4
    for wrong in ((query, key[:, :, :, :4]), (query[:, :3], key), (query[0, 0], key[0, 0])):
        with pytest.raises(ValueError, match="max_logits: queries"):
            max_logits(*wrong)


def test_no_gradient_is_kept():
    query, key = tensors()
    assert not max_logits(query.requires_grad_(), key).requires_grad
