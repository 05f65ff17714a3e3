"""Attention in blocks: what torch's own function computes in float32, at least as exactly as its bfloat16 does."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from modeling_llava.acceleration import block_attention
from modeling_llava.acceleration.block_attention import attend_in_blocks
from modeling_llava.inference.loading import prepare_for_answering
from tests.tiny import random_images, tiny_model


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [5, 256, 300, 700])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_all_tokens_attend_as_in_torch(groups, is_causal, length, scaling, monkeypatch):
    monkeypatch.setattr(block_attention, "MAX_SCORES", 2**18)  # so that heads come one after the other
    torch.manual_seed(0)
    query = torch.randn(2, length, 4 * groups, 16).transpose(1, 2)
    key, value = (torch.randn(2, length, 4, 16).transpose(1, 2) for _ in range(2))
    settings = {"is_causal": is_causal, "scale": scaling, "enable_gqa": groups > 1}
    expected = scaled_dot_product_attention(query, key, value, **settings).transpose(1, 2)
    exact = attend_in_blocks(query, key, value, is_causal=is_causal, scaling=scaling)
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-5)
    rounded = attend_in_blocks(
        query.bfloat16(), key.bfloat16(), value.bfloat16(), is_causal=is_causal, scaling=scaling
    )
    torch.testing.assert_close(rounded.float(), expected, rtol=0, atol=5e-2)


@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_a_model_in_bfloat16_computes_with_it(vision, text, monkeypatch):
    model = tiny_model(text, vision=vision)
    image = [model.config.image_token_id] * 16
    inputs = {"input_ids": torch.tensor([[1, *image, 5, 6, 7]]), "pixel_values": random_images(1)}
    expected = model(**inputs).logits
    calls = []
    monkeypatch.setattr(
        block_attention,
        "attend_in_blocks",
        lambda *args, **kwargs: calls.append(1) or attend_in_blocks(*args, **kwargs),
    )
    prepare_for_answering(model)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert not calls
    model = tiny_model(text, vision=vision).bfloat16()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    rounded = model(**inputs).logits.float()
    assert not calls
    prepare_for_answering(model)
    found = model(**inputs).logits.float()
    assert len(calls) > model.config.text_config.num_hidden_layers
    assert (found - expected).norm() < 1.5 * (rounded - expected).norm()
