"""Prompt lookup with pictures: the tokens of greedy decoding, in fewer passes of the language model."""

import pytest

from tests.tiny import IMAGE_TOKEN_ID, batch, random_images, text_ids, tiny_model

NUM_TOKENS = 24
SETTINGS = {"do_sample": False, "max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS}


@pytest.mark.parametrize("num_images", [0, 2])
def test_same_tokens_in_fewer_passes(num_images):
    model = tiny_model()
    phrase = text_ids(5)
    inputs = batch([[1, *[IMAGE_TOKEN_ID] * 16 * num_images, *phrase, *phrase, *phrase]])
    if num_images:
        inputs["pixel_values"] = random_images(num_images)
    expected = model.generate(**inputs, **SETTINGS)
    passes = []
    model.model.language_model.register_forward_hook(lambda module, args, output: passes.append(output))
    assert model.generate(**inputs, **SETTINGS, prompt_lookup_num_tokens=4).tolist() == expected.tolist()
    assert len(passes) < NUM_TOKENS
