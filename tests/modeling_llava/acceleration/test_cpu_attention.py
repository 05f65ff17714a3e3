"""Attention on a CPU: what torch's own function computes, for many tokens and for one.

Blocks in bfloat16 are at least as exact as torch's own function.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from modeling_llava.acceleration import cpu_layers
from modeling_llava.acceleration.cpu_layers import ATTENTION, attend_in_blocks, attend_to_cache, use_cpu_attention
from modeling_llava.inference.loading import load_for_inference, prepare_for_answering
from tests.tiny import batch, random_images, save_tiny_checkpoint, text_ids, tiny_model


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [5, 256, 300, 700])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_all_tokens_attend_as_in_torch(groups, is_causal, length, scaling, monkeypatch):
    monkeypatch.setattr(cpu_layers, "MAX_SCORES", 2**18)  # so that heads come one after the other
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
        cpu_layers,
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


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", [None, "bool", "float"])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_a_token_attends_as_in_torch(groups, kind, scaling, dtype, tolerance):
    torch.manual_seed(0)
    # Rows lie in buffers that have room for more.
    key, value = (torch.randn(3, 2, 50, 16, dtype=dtype)[:, :, :37] for _ in range(2))
    query = torch.randn(3, 2 * groups, 1, 16, dtype=dtype)
    mask = None if kind is None else torch.rand(3, 1, 1, 37) < 0.7
    if kind == "float":
        mask = torch.where(mask, 0.0, -torch.inf).to(dtype)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=groups > 1)
    attended = attend_to_cache(query.view(3, 2, groups, 16), key, value, scaling=scaling, mask=mask)
    torch.testing.assert_close(attended.flatten(1, 2)[:, :, None], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen3", "gemma", "phi"])
@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_generation_gives_the_same_tokens(text, settings):
    model = tiny_model(text)
    if text == "mistral":
        model.config.text_config.sliding_window = 12
    image = [model.config.image_token_id] * 16
    rows = batch([[1, *image, *text_ids(20)], [1, *text_ids(9)]], padding_side="left")
    inputs = {**rows, "pixel_values": random_images(1)}
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False, **settings)
    use_cpu_attention(model.model.language_model)
    assert model.model.language_model.config._attn_implementation == ATTENTION
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    assert model.generate(**inputs, max_new_tokens=8, do_sample=False, **settings).equal(expected)


def test_other_attention_stays_as_it_is():
    for model in (tiny_model("mpt"), tiny_model()):
        before = "eager"
        if model.config.text_config.model_type != "mpt":
            model.set_attn_implementation(before)
        prepare_for_answering(model)
        assert model.model.language_model.config._attn_implementation == before


def test_loading_for_inference_chooses_it(tmp_path):
    save_tiny_checkpoint(tmp_path)
    model, _ = load_for_inference(str(tmp_path), device="cpu")
    assert model.model.language_model.config._attn_implementation == ATTENTION
