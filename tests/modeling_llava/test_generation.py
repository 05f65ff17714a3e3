"""Every way of generating gives the tokens of a plain loop, and shows each image to the tower once."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, RepetitionPenaltyLogitsProcessor
from transformers.utils.logging import warning_once

from modeling_llava import AnyLlavaForConditionalGeneration
from processing_llava.transformers_versions import CAN_PREFILL_IMAGES_IN_CHUNKS
from tests.tiny import (
    IMAGE_TOKEN_ID,
    PATCH_SIZE,
    PINPOINTS,
    TEXT_CONFIGS,
    TILE_SIZE,
    batch,
    random_images,
    text_ids,
    tiny_config,
    tiny_processor,
)
from tests.tiny import tiny_model as build_tiny_model

pytestmark = pytest.mark.core

IMAGE = [IMAGE_TOKEN_ID] * (TILE_SIZE // PATCH_SIZE) ** 2
NEW_TOKENS = 6
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}


@pytest.fixture
def model():
    return build_tiny_model()


@pytest.fixture
def tower_calls(model):
    return record_tower_calls(model)


def record_tower_calls(model) -> list[int]:
    """How many tiles the tower sees, from here on, in each of its calls."""
    calls = []
    model.model.vision_tower.register_forward_hook(
        lambda module, args, output: calls.append(len(output.last_hidden_state))
    )
    return calls


def prompt(num_images: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, *IMAGE * num_images, *text_ids(6)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": random_images(num_images)}


@torch.no_grad()
def generate_by_hand(model, inputs: dict[str, torch.Tensor], choose) -> torch.Tensor:
    """`choose` from the logits of the full forward, one token at a time, without any cache; never the end token."""
    ids = inputs["input_ids"]
    for _ in range(NEW_TOKENS):
        logits = model(ids, pixel_values=inputs["pixel_values"], use_cache=False).logits[:, -1]
        logits[:, model.config.text_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, choose(logits)], dim=1)
    return ids


def greedy_by_hand(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return generate_by_hand(model, inputs, lambda logits: logits.argmax(-1, keepdim=True))


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
    if "prefill_chunk_size" in settings and not CAN_PREFILL_IMAGES_IN_CHUNKS:
        with pytest.raises(ValueError, match="below 5.23"):
            model.generate(**inputs, **GREEDY, **settings)
        return
    expected = greedy_by_hand(model, inputs)
    tower_calls.clear()
    generated = model.generate(**inputs, **GREEDY, **settings)
    assert generated.tolist() == expected.tolist()
    assert tower_calls == [2]


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_greedy_with_every_text_model(text):
    model = build_tiny_model(text)
    inputs = prompt()
    assert model.generate(**inputs, **GREEDY).tolist() == greedy_by_hand(model, inputs).tolist()


def test_assisted_by_a_smaller_llava(model, tower_calls):
    inputs = prompt(num_images=2)
    expected = greedy_by_hand(model, inputs)
    config = tiny_config()
    config.text_config = LlamaConfig(**config.text_config.to_dict() | {"hidden_size": 16, "head_dim": 4})
    torch.manual_seed(1)
    assistant = AnyLlavaForConditionalGeneration(config).eval()
    assistant_calls = record_tower_calls(assistant)
    tower_calls.clear()
    assert model.generate(**inputs, **GREEDY, assistant_model=assistant).tolist() == expected.tolist()
    assert tower_calls == assistant_calls == [2]


def test_a_llava_that_reads_images_otherwise_is_no_assistant(model):
    assistant = build_tiny_model(visual_tokens=4)
    with pytest.raises(ValueError, match=r"assistant with images of \[4\] tokens; expected .* \[16\] tokens"):
        model.generate(**prompt(), **GREEDY, assistant_model=assistant)


def test_assisted_by_a_text_model(model, tower_calls):
    inputs = prompt(num_images=2)
    expected = greedy_by_hand(model, inputs)
    torch.manual_seed(1)
    assistant = LlamaForCausalLM(TEXT_CONFIGS["llama"]()).eval()
    tower_calls.clear()
    assert model.generate(**inputs, **GREEDY, assistant_model=assistant).tolist() == expected.tolist()
    assert tower_calls == [2]


def test_left_padded_batch_of_mixed_rows_equals_rows_alone(model, tower_calls):
    images = random_images(3)
    rows = [([1, *text_ids(20)], []), ([1, *IMAGE, 5], [0]), ([1, *IMAGE, 6, *IMAGE, 7], [1, 2])]
    inputs = batch([ids for ids, _ in rows], padding_side="left")
    together = model.generate(**inputs, pixel_values=images, **GREEDY)[:, -NEW_TOKENS:]
    assert tower_calls == [3]
    for row, (ids, chosen) in zip(together, rows):
        pixel_values = images[chosen] if chosen else None
        alone = model.generate(torch.tensor([ids]), pixel_values=pixel_values, **GREEDY)
        assert row.tolist() == alone[0, -NEW_TOKENS:].tolist()


def test_beam_search_finds_a_likelier_sequence_than_greedy(model, tower_calls):
    inputs = prompt()
    beams = model.generate(**inputs, **GREEDY, num_beams=4, num_return_sequences=3)
    assert beams.shape == (3, inputs["input_ids"].shape[1] + NEW_TOKENS)
    assert tower_calls == [1]

    def log_likelihood(ids: torch.Tensor) -> float:
        logits = model(ids[None], pixel_values=inputs["pixel_values"]).logits[0].log_softmax(-1)
        return logits[-NEW_TOKENS - 1 : -1].gather(1, ids[-NEW_TOKENS:, None]).sum().item()

    assert log_likelihood(beams[0]) >= log_likelihood(greedy_by_hand(model, inputs)[0]) - 1e-4


@pytest.mark.parametrize("num_return_sequences", [1, 3])
def test_sampling_equals_sampling_by_hand_with_the_same_seed(model, tower_calls, num_return_sequences):
    inputs = prompt(num_images=2)
    settings = GREEDY | {"do_sample": True, "top_k": 0, "num_return_sequences": num_return_sequences}
    torch.manual_seed(0)
    samples = model.generate(**inputs, **settings)
    assert tower_calls == [2]

    repeated = {
        "input_ids": inputs["input_ids"].repeat_interleave(num_return_sequences, dim=0),
        "pixel_values": inputs["pixel_values"].repeat(num_return_sequences, 1, 1, 1),
    }
    torch.manual_seed(0)
    expected = generate_by_hand(model, repeated, lambda logits: logits.softmax(-1).multinomial(1))
    assert samples.tolist() == expected.tolist()
    assert len({tuple(row) for row in samples.tolist()}) == num_return_sequences


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


@pytest.mark.parametrize("setting", [{"encoder_repetition_penalty": 2.0}, {"encoder_no_repeat_ngram_size": 2}])
def test_settings_that_look_at_the_prompt_are_shown_text_only(model, setting):
    inputs = prompt()
    length = inputs["input_ids"].shape[1]
    assert model.generate(**inputs, **GREEDY, **setting).shape[1] == length + NEW_TOKENS
    ids = inputs["input_ids"]
    scores = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    with_images, without = (
        model._get_logits_processor(
            model._prepare_generation_config(None, **setting)[0],
            input_ids_seq_length=length,
            encoder_input_ids=encoder_ids,
            device="cpu",
        )(torch.tensor([[1, 5]]), scores.clone())
        for encoder_ids in (ids, ids[ids != IMAGE_TOKEN_ID][None])
    )
    assert torch.equal(with_images, without)


def test_an_answer_holds_no_image_token():
    model = build_tiny_model(image_token_id=299)
    ids = torch.tensor([[1, *[299] * len(IMAGE), 5, 6, 7]])
    inputs = {"input_ids": ids, "pixel_values": random_images(1)}
    with torch.no_grad():
        # The greedy token from here on.
        model.lm_head.weight.data[299] = 100 * model.model(**inputs).last_hidden_state[0, -1]
        assert model(**inputs).logits[0, -1].argmax() == 299
    assert 299 not in model.generate(**inputs, **GREEDY)[0, -NEW_TOKENS:]


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


def test_tiled_images():
    model = build_tiny_model(patch_merge_type="spatial_unpad", image_grid_pinpoints=PINPOINTS)
    sizes = torch.tensor([[40, 60], [28, 28]])
    pixel_values = random_images(2, num_tiles=5)
    layouts = model.model.plan_images(pixel_values, sizes)
    rows = [[1, *[IMAGE_TOKEN_ID] * layout.num_tokens, 7, 8] for layout in layouts]
    inputs = batch(rows, padding_side="left")
    tower_calls = record_tower_calls(model)
    together = model.generate(**inputs, pixel_values=pixel_values, image_sizes=sizes, **GREEDY, num_beams=2)
    assert tower_calls == [sum(layout.num_tiles for layout in layouts)]
    for index, row in enumerate(rows):
        alone = model.generate(
            torch.tensor([row]),
            pixel_values=pixel_values[index : index + 1],
            image_sizes=sizes[index : index + 1],
            num_beams=2,
            **GREEDY,
        )
        assert together[index, -NEW_TOKENS:].tolist() == alone[0, -NEW_TOKENS:].tolist()


def test_embeddings_will_do_for_ids(model):
    inputs = prompt()
    expected = model.generate(**inputs, **GREEDY)
    ids, text = inputs["input_ids"], model.get_input_embeddings()
    with torch.no_grad():
        embeds = text(ids.where(ids != IMAGE_TOKEN_ID, 0))
        embeds[ids == IMAGE_TOKEN_ID] = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    length = ids.shape[1]
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), expected[:, length:])
    assert torch.equal(model.generate(ids, inputs_embeds=embeds, **GREEDY), expected)


def test_a_further_turn_brings_its_own_images_only(model):
    first = prompt()
    answered = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    cache = answered.past_key_values
    ids = torch.tensor([[*answered.sequences[0].tolist(), *IMAGE, *text_ids(4)]])
    new_images = random_images(2)[1:]
    expected = model.generate(ids, pixel_values=torch.cat([first["pixel_values"], new_images]), **GREEDY)
    found = model.generate(ids, pixel_values=new_images, past_key_values=cache, **GREEDY)
    assert torch.equal(found, expected)


def test_a_model_that_trains_with_checkpointing_answers_as_without(model):
    expected = model.generate(**prompt(), **GREEDY)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.train().generate(**prompt(), **GREEDY), expected)


def test_pictures_of_another_size_are_refused(model):
    """DINOv2 would take them, and only some of their features would be looked at."""
    inputs = prompt()
    larger = torch.nn.functional.interpolate(inputs["pixel_values"], scale_factor=2)
    with pytest.raises(ValueError, match=f"pixels; expected {TILE_SIZE} by {TILE_SIZE}"):
        model.generate(**inputs | {"pixel_values": larger}, **GREEDY)


def test_arguments_of_transformers_that_say_nothing_or_cut_layers(model):
    inputs = batch([[*IMAGE, *text_ids(4)]]) | {"pixel_values": random_images(1)}
    assert torch.equal(model.generate(**inputs, mm_encoder_outputs=None, **GREEDY), model.generate(**inputs, **GREEDY))
    with pytest.raises(ValueError, match="got assistant_early_exit=2"):
        model.generate(**inputs, assistant_early_exit=2, **GREEDY)


def test_prompts_that_are_too_long_are_one_warning(model, caplog):
    warning_once.cache_clear()
    longest = model.config.text_config.max_position_embeddings
    for num_tokens in (longest, longest + 1, longest + 2):
        ids = torch.tensor([[1, *text_ids(num_tokens - 1)]])
        assert ("got a prompt of more than" in caplog.text) == (num_tokens > longest + 1)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    assert caplog.text.count(f"got a prompt of more than {longest} tokens") == 1
    processor = tiny_processor()
    long = "a " * processor.tokenizer.model_max_length
    for texts in ("a", [long, "a"], long):
        processor(text=texts)
    processor(text=long, truncation=True, max_length=10)
    assert caplog.text.count("2048 tokens, the model_max_length of the tokenizer") == 1


@pytest.mark.parametrize("stop", ["a", ["a", "b"]])
def test_a_processor_is_a_tokenizer_for_stop_strings(model, stop):
    processor = tiny_processor()
    given = [
        model.generate(**prompt(), **GREEDY | {"min_new_tokens": 0}, stop_strings=stop, tokenizer=each)
        for each in (processor, processor.tokenizer)
    ]
    assert torch.equal(*given)
