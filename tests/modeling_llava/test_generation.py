"""Every way of generating gives the tokens of the plain greedy loop, with one call of the tower per image."""

import pytest
import torch
from transformers import LlamaForCausalLM, RepetitionPenaltyLogitsProcessor

from tests.tiny import IMAGE_TOKEN_ID, PATCH_SIZE, PINPOINTS, TEXT_CONFIGS, TILE_SIZE, batch, random_images, text_ids
from tests.tiny import tiny_model as build_tiny_model

IMAGE = [IMAGE_TOKEN_ID] * (TILE_SIZE // PATCH_SIZE) ** 2
NEW_TOKENS = 6
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}


@pytest.fixture
def model():
    return build_tiny_model()


@pytest.fixture
def tower_calls(model):
    calls = []
    model.model.vision_tower.register_forward_hook(lambda module, args, output: calls.append(1))
    return calls


def prompt(num_images: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, *IMAGE * num_images, *text_ids(6)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": random_images(num_images)}


def greedy_by_hand(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Argmax of the full forward, one token at a time, without any cache. The end token is never chosen."""
    ids = inputs["input_ids"]
    for _ in range(NEW_TOKENS):
        logits = model(ids, pixel_values=inputs["pixel_values"], use_cache=False).logits[:, -1]
        logits[:, model.config.text_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 5},
        {"use_cache": False},
        {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0},
    ],
    ids=["dynamic", "static", "prompt_lookup", "chunked_prefill", "no_cache", "no_op_processors"],
)
def test_greedy(model, tower_calls, settings):
    inputs = prompt(num_images=2)
    expected = greedy_by_hand(model, inputs)
    tower_calls.clear()
    generated = model.generate(**inputs, **GREEDY, **settings)
    assert generated.tolist() == expected.tolist()
    assert len(tower_calls) == 1


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_greedy_with_every_text_model(text):
    model = build_tiny_model(text)
    inputs = prompt()
    assert model.generate(**inputs, **GREEDY).tolist() == greedy_by_hand(model, inputs).tolist()


def test_assisted_by_a_smaller_llava(model):
    inputs = prompt()
    expected = greedy_by_hand(model, inputs)
    assistant = build_tiny_model(seed=1)
    assert model.generate(**inputs, **GREEDY, assistant_model=assistant).tolist() == expected.tolist()


def test_assisted_by_a_text_model(model):
    inputs = prompt()
    expected = greedy_by_hand(model, inputs)
    torch.manual_seed(1)
    assistant = LlamaForCausalLM(TEXT_CONFIGS["llama"]()).eval()
    assert model.generate(**inputs, **GREEDY, assistant_model=assistant).tolist() == expected.tolist()


def test_left_padded_batch_of_mixed_rows_equals_rows_alone(model):
    images = random_images(3)
    rows = [([1, *text_ids(20)], []), ([1, *IMAGE, 5], [0]), ([1, *IMAGE, 6, *IMAGE, 7], [1, 2])]
    inputs = batch([ids for ids, _ in rows], padding_side="left")
    together = model.generate(**inputs, pixel_values=images, **GREEDY)[:, -NEW_TOKENS:]
    for row, (ids, chosen) in zip(together, rows):
        pixel_values = images[chosen] if chosen else None
        alone = model.generate(torch.tensor([ids]), pixel_values=pixel_values, **GREEDY)
        assert row.tolist() == alone[0, -NEW_TOKENS:].tolist()


def test_beam_search_finds_a_likelier_sequence_than_greedy(model, tower_calls):
    inputs = prompt()
    beams = model.generate(**inputs, **GREEDY, num_beams=4, num_return_sequences=3)
    assert beams.shape == (3, inputs["input_ids"].shape[1] + NEW_TOKENS)
    assert len(tower_calls) == 1

    def log_likelihood(ids: torch.Tensor) -> float:
        logits = model(ids[None], pixel_values=inputs["pixel_values"]).logits[0].log_softmax(-1)
        return logits[-NEW_TOKENS - 1 : -1].gather(1, ids[-NEW_TOKENS:, None]).sum().item()

    assert log_likelihood(beams[0]) >= log_likelihood(greedy_by_hand(model, inputs)[0]) - 1e-4


def test_sampling_repeats_with_its_seed(model):
    inputs = prompt()
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(model.generate(**inputs, do_sample=True, max_new_tokens=NEW_TOKENS, num_return_sequences=2))
    assert samples[0].tolist() == samples[1].tolist()
    assert samples[0].tolist() != samples[2].tolist()


def test_repetition_penalty_counts_text_only(model):
    inputs = prompt()
    generated = model.generate(**inputs, **GREEDY, repetition_penalty=3.0)
    ids, penalty = inputs["input_ids"], RepetitionPenaltyLogitsProcessor(3.0)
    for _ in range(NEW_TOKENS):
        logits = model(ids, pixel_values=inputs["pixel_values"]).logits[:, -1]
        logits = penalty(ids[ids != IMAGE_TOKEN_ID][None], logits)
        logits[:, model.config.text_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert generated.tolist() == ids.tolist()
    assert generated.tolist() != model.generate(**inputs, **GREEDY).tolist()


def test_encoded_images_are_generated_from_without_the_tower(model, tower_calls):
    inputs = prompt()
    expected = model.generate(**inputs, **GREEDY)
    encoded = model.get_image_features(inputs.pop("pixel_values"))
    tower_calls.clear()
    generated = model.generate(**inputs, **GREEDY, mm_encoder_outputs={"image": encoded})
    assert generated.tolist() == expected.tolist()
    assert not tower_calls


def test_a_second_turn_on_the_cache_of_the_first_equals_starting_over(model, tower_calls):
    inputs = prompt()
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, torch.tensor([text_ids(4, seed=3)])], dim=1)
    tower_calls.clear()
    second = model.generate(longer, **GREEDY, past_key_values=first.past_key_values)
    assert not tower_calls
    assert second.tolist() == model.generate(longer, pixel_values=inputs["pixel_values"], **GREEDY).tolist()


def test_tiled_images(model):
    model = build_tiny_model(patch_merge_type="spatial_unpad", image_grid_pinpoints=PINPOINTS)
    sizes = torch.tensor([[40, 60], [28, 28]])
    pixel_values = random_images(2, num_tiles=5)
    lengths = [layout.num_tokens for layout in model.model.plan_images(pixel_values, sizes)]
    rows = [[1, *[IMAGE_TOKEN_ID] * length, 7, 8] for length in lengths]
    inputs = batch(rows, padding_side="left")
    together = model.generate(**inputs, pixel_values=pixel_values, image_sizes=sizes, **GREEDY, num_beams=2)
    for index, row in enumerate(rows):
        alone = model.generate(
            torch.tensor([row]),
            pixel_values=pixel_values[index : index + 1],
            image_sizes=sizes[index : index + 1],
            num_beams=2,
            **GREEDY,
        )
        assert together[index, -NEW_TOKENS:].tolist() == alone[0, -NEW_TOKENS:].tolist()
