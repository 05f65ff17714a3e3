"""Prompt lookup with pictures: the tokens of greedy decoding, in fewer passes of the language model."""

import pytest
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from modeling_llava.generation import TextLookupGenerator
from tests.tiny import IMAGE_TOKEN_ID, VOCAB_SIZE, batch, random_images, text_ids, tiny_model

NUM_TOKENS = 24
SETTINGS = {"do_sample": False, "max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS}


@pytest.mark.parametrize("image_token_id", [IMAGE_TOKEN_ID, VOCAB_SIZE - 1], ids=["beyond", "inside"])
def test_what_follows_in_the_prompt_may_be_an_image(image_token_id):
    """As in every conversation format that writes a line break before an image."""
    model = tiny_model(image_token_id=image_token_id)
    phrase = [5, 6, 7]
    ids = [1, *phrase, *[image_token_id] * 16, *phrase, 8, 9, *phrase, *[image_token_id] * 16, *phrase]
    inputs = batch([ids]) | {"pixel_values": random_images(2)}
    expected = model.generate(**inputs, **SETTINGS)
    assert model.generate(**inputs, **SETTINGS, prompt_lookup_num_tokens=4).tolist() == expected.tolist()
    lookup = TextLookupGenerator(
        PromptLookupCandidateGenerator(max_length=99, vocab_size=VOCAB_SIZE), image_token_id=image_token_id
    )
    candidates, _ = lookup.get_candidates(inputs["input_ids"])
    assert candidates[0, len(ids) :].tolist()[:5] == [8, 9, *phrase]


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
