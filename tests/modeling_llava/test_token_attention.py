"""Attention of one token on a processor: what torch's own function computes, for every mask and kind of heads."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from modeling_llava.acceleration.token_attention import NAME, attend_to_states, use_token_attention
from modeling_llava.inference.loading import load_for_inference, prepare_for_answering
from tests.tiny import batch, random_images, save_tiny_checkpoint, text_ids, tiny_model


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
    attended = attend_to_states(query.view(3, 2, groups, 16), key, value, scaling=scaling, mask=mask)
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
    use_token_attention(model)
    assert model.model.language_model.config._attn_implementation == NAME
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
    assert model.model.language_model.config._attn_implementation == NAME
