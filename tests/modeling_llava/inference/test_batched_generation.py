"""generate_answers: the tokens of `generate` for each request, whoever shares the batch, within the bounds."""

import gc
import random
import threading
import weakref
from functools import cache

import PIL.Image
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.inference import batched_generation
from modeling_llava.inference.answer_requests import AnswerRequest
from modeling_llava.inference.batched_generation import BatchedGeneration, generate_answers
from modeling_llava.inference.chat_cache import ChatCache
from modeling_llava.inference.chat_session import ChatSession
from modeling_llava.inference.loading import load_for_inference
from modeling_llava.inference.row_cache import NewRow, RowCache
from processing_llava.templates import load_template
from tests.conftest import GOLDENS
from tests.modeling_llava.inference.session_models import (
    build_anyres,
    build_text_model,
    follow_script,
    load_transformers_own,
)
from tests.tiny import tiny_config, tiny_processor

pytestmark = pytest.mark.core

CAT, COFFEE, RETINA = (
    PIL.Image.open(GOLDENS / "images" / f"{name}.png").convert("RGB")
    for name in ("cat_451x300", "coffee_150x200", "retina_97x413")
)
TALL = CAT.resize((40, 160))
"""Of fewer tiles than the others, and never beside them in a request."""


MODELS = {
    "embedded": load_for_inference,
    "anyres": build_anyres,
    "transformers": load_transformers_own,
    "sliding": lambda: build_text_model("mistral", sliding_window=100),
    **{text: lambda text=text: build_text_model(text) for text in ("llama", "mistral", "qwen3", "gemma", "phi")},
}


@cache
def load(name: str):
    return MODELS[name]()


def ask(text: str, *images, **settings) -> AnswerRequest:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return AnswerRequest([{"role": "user", "content": content}], **{"max_new_tokens": 6} | settings)


MIXED = [
    ask("What is this?", CAT, max_new_tokens=9),
    ask("Hello, who are you? Tell me more than one word about it, please.", max_new_tokens=3),
    ask("Which of the two is larger?", CAT, RETINA, max_new_tokens=12),
    ask("Why?", TALL, max_new_tokens=5),
    ask("a", max_new_tokens=1),
    ask("What is in these pictures?", RETINA, COFFEE, COFFEE),
    AnswerRequest(
        [
            *ask("What is this?", COFFEE).messages,
            {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
            *ask("And this?", CAT).messages,
        ],
        max_new_tokens=5,
    ),
]


def answer_alone(model, processor, request: AnswerRequest, **settings) -> list[int]:
    inputs = processor.apply_chat_template(
        request.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    settings = {"do_sample": False, "max_new_tokens": request.max_new_tokens} | settings
    return model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()


def answer_together(model, processor, requests: list[AnswerRequest], **limits) -> list[list[int]]:
    answers = {answer.index: answer for answer in generate_answers(model, processor, requests, **limits)}
    assert [answer.error for answer in answers.values()] == [None] * len(requests)
    return [answers[index].ids for index in range(len(requests))]


@pytest.fixture
def passes(monkeypatch):
    """The number of tokens of each pass of the language model of `load("llama")`, and of pictures of its tower."""
    model = load("llama")[0].model
    seen = {"tokens": [], "pictures": []}
    hooks = [
        model.language_model.register_forward_hook(
            lambda module, arguments, output: seen["tokens"].append(output.last_hidden_state[..., 0].numel())
        ),
        model.vision_tower.register_forward_hook(
            lambda module, arguments, output: seen["pictures"].append(len(output.last_hidden_state))
        ),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def count_prompt_tokens(processor, requests: list[AnswerRequest]) -> list[int]:
    prompts = [request.messages for request in requests]
    ids = processor.apply_chat_template(prompts, add_generation_prompt=True, tokenize=True, return_dict=True)
    return [len(row) for row in ids["input_ids"]]


@pytest.mark.parametrize("name", MODELS)
def test_mixed_requests_get_the_tokens_of_generate(name, monkeypatch):
    model, processor = load(name)
    expected = [answer_alone(model, processor, request) for request in MIXED]
    assert answer_together(model, processor, MIXED) == expected
    assert answer_together(model, processor, MIXED, max_rows=2) == expected
    # What a GPU does: one call with a mask for all rows.
    monkeypatch.setattr(
        batched_generation, "RowCache", lambda **settings: RowCache(**settings | {"row_by_row": False})
    )
    assert answer_together(model, processor, MIXED, max_rows=3) == expected


def test_an_answer_ends_where_the_format_ends_it():
    model, processor = build_text_model("llama")
    processor.chat_template = load_template("llava_v0")
    ids = follow_script(model, processor, "A cat.###Human: What?")
    (answer,) = generate_answers(model, processor, [ask("What is this?", CAT, max_new_tokens=30)])
    assert answer.text == "A cat."
    assert len(answer.ids) < len(ids)


def test_an_answer_that_ends_by_itself_leaves_at_once():
    model, processor = load("embedded")
    (answer,) = generate_answers(model, processor, [ask("What is in the picture?", CAT, max_new_tokens=200)])
    assert answer.ids[-1] in model.generation_config.eos_token_id and len(answer.ids) < 200
    session = ChatSession(model, processor)
    assert answer.text == "".join(session.ask("What is in the picture?", images=[CAT], max_new_tokens=200)) != ""


def test_no_token_is_computed_twice_or_padded(passes):
    model, processor = load("llama")
    prompt_tokens = count_prompt_tokens(processor, MIXED)
    answers = answer_together(model, processor, MIXED, max_rows=3)
    # The last token of an answer is never an input.
    assert sum(passes["tokens"]) == sum(prompt_tokens) + sum(len(ids) - 1 for ids in answers)
    assert len(passes["tokens"]) < sum(map(len, answers)) / 2


def test_a_request_joins_as_soon_as_another_leaves(passes):
    model, processor = load("llama")
    lengths = [2, 9, 3, 4]
    requests = [ask("a", max_new_tokens=length) for length in lengths]
    order = [answer.index for answer in generate_answers(model, processor, requests, max_rows=2)]
    # 0 leaves after pass 2, so that 2 runs from 3 to 5 and 3 from 6 to 9; 1 runs from 1 to 9.
    assert order == [0, 2, 1, 3]
    assert len(passes["tokens"]) == 9


def test_long_prompts_do_not_all_join_at_once(passes, monkeypatch):
    model, processor = load("llama")
    prompt_tokens = count_prompt_tokens(processor, MIXED)
    expected = answer_together(model, processor, MIXED)
    assert passes["tokens"][0] == sum(prompt_tokens)
    passes["tokens"].clear()
    monkeypatch.setattr(batched_generation, "MAX_PASS_TOKENS", 200)
    assert answer_together(model, processor, MIXED) == expected
    assert max(passes["tokens"]) < 200 + max(prompt_tokens) + len(MIXED) < sum(prompt_tokens)


def test_pictures_that_join_together_are_encoded_together_and_each_once(passes):
    model, processor = load("llama")
    chat_cache = ChatCache()
    answer_together(model, processor, MIXED, cache=chat_cache)
    assert passes["pictures"] == [4]
    answer_together(model, processor, MIXED[::-1], cache=chat_cache)
    assert passes["pictures"] == [4]


def test_sampling_depends_on_the_seed_and_not_on_the_company():
    model, processor = load("llama")
    sampling = {"temperature": 1.5, "top_p": 0.9}
    requests = [ask("What?", CAT, seed=seed, **sampling) for seed in (3, 4, 3)]
    together = answer_together(model, processor, [*requests, *MIXED])
    assert together[0] == together[2] != together[1]
    torch.manual_seed(4)
    assert answer_alone(model, processor, requests[1], do_sample=True, top_k=0, **sampling) == together[1]
    assert together[3:] == answer_together(model, processor, MIXED)


def test_the_generation_config_of_the_model_counts(monkeypatch):
    model, processor = load("llama")
    plain = answer_together(model, processor, MIXED)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 3.0)
    expected = [answer_alone(model, processor, request) for request in MIXED]
    assert answer_together(model, processor, MIXED) == expected != plain


def test_a_request_that_fails_stops_no_other():
    model, processor = load("llama")
    bad = {
        1: (ask("What?", b"no picture"), "image"),
        3: (ask("word " * 600), "fewer than 512"),
        4: (ask("a", max_new_tokens=2000), "raise max_cache_tokens"),
        6: (ask("a", temperature=-1), "temperature=-1"),
        7: (ask("a", max_new_tokens=0), "max_new_tokens=0"),
        8: (AnswerRequest([]), "expected a list of messages"),
        9: (ask("What?", GOLDENS / "nowhere.png"), "nowhere.png"),
        10: (AnswerRequest([{"content": "hi"}]), "message 0"),
        11: (AnswerRequest("hi"), "conversation 'hi'"),
        12: (ask("a", temperature="1"), "temperature='1'"),
        13: (ask("a", max_new_tokens=None), "max_new_tokens=None"),
        14: (ask("a", seed=1.5), "seed=1.5"),
        15: ("hi", "got a str as a request"),
    }
    good = {0: MIXED[0], 2: MIXED[1], 5: MIXED[2]}
    requests = [good[index] if index in good else bad[index][0] for index in range(16)]
    answers = {answer.index: answer for answer in generate_answers(model, processor, requests, max_cache_tokens=448)}
    assert set(answers) == set(range(16))
    for index, (_, message) in bad.items():
        assert isinstance(answers[index].error, ValueError) and message in str(answers[index].error)
        assert answers[index].ids == []
    for index, request in good.items():
        assert answers[index].ids == answer_alone(model, processor, request)


@pytest.mark.parametrize("name", ["llama", "transformers"])
def test_no_answer_holds_an_image_token_that_has_a_logit(name):
    if name == "transformers":
        model, processor = load_transformers_own()
    else:
        processor = tiny_processor()
        config = tiny_config(image_token_id=processor.image_token_id)
        config.text_config.vocab_size = processor.image_token_id + 1
        model = AnyLlavaForConditionalGeneration(config).eval()
    model.lm_head.weight.data[processor.image_token_id] *= 1000
    answers = answer_together(model, processor, [ask("What is this?", CAT), ask("a")])
    assert [len(ids) for ids in answers] == [6, 6]
    assert processor.image_token_id not in [*answers[0], *answers[1]]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ValueError])
def test_a_pass_that_fails_takes_only_its_own_requests(layer, error):
    """In the middle of the model, where one layer has cached the new tokens and the other has not."""
    model, processor = load("llama")
    expected = answer_alone(model, processor, MIXED[2])
    batch = BatchedGeneration(model, processor, max_rows=2)
    for index, request in enumerate(MIXED[:3]):
        batch.add(index, request)
    batch.step()

    def fail(module, args):
        hook.remove()
        raise error("no room")

    hook = model.model.language_model.layers[layer].register_forward_pre_hook(fail)
    failed = batch.step()
    assert [(answer.index, str(answer.error), answer.ids) for answer in failed] == [
        (0, "no room", []),
        (1, "no room", []),
    ]
    answers = []
    while batch.num_requests:
        answers += batch.step()
    assert [(answer.index, answer.ids) for answer in answers] == [(2, expected)]


def test_requests_are_read_as_there_is_room_for_them():
    model, processor = load("llama")
    read = []

    def requests():
        for number in range(20):
            read.append(number)
            yield ask("a", max_new_tokens=3)

    answers = generate_answers(model, processor, requests(), max_rows=2)
    next(answers)
    assert len(read) == 3
    assert len(list(answers)) == 19


def test_requests_join_while_others_are_answered():
    model, processor = load("llama")
    batch = BatchedGeneration(model, processor)
    batch.add(7, ask("What?", CAT, max_new_tokens=4))
    assert batch.step() == []
    batch.add(8, ask("a", max_new_tokens=3))
    assert [[answer.index for answer in batch.step()] for _ in range(3)] == [[], [], [7, 8]]
    assert (batch.num_requests, batch.step()) == (0, [])


def test_closing_frees_the_cache(monkeypatch):
    caches = []
    monkeypatch.setattr(
        batched_generation,
        "RowCache",
        lambda **settings: caches.append(weakref.ref(made := RowCache(**settings))) or made,
    )
    answers = generate_answers(*load("llama"), MIXED)
    next(answers)
    assert caches[0]() is not None
    answers.close()
    gc.collect()
    assert caches[0]() is None


def test_between_answers_the_model_is_as_before():
    model, processor = load("llama")
    expected = [answer_alone(model, processor, request) for request in MIXED]
    for answer in generate_answers(model, processor, MIXED):
        assert model.model.language_model.config._attn_implementation == "sdpa"
        assert answer.ids == expected[answer.index] == answer_alone(model, processor, MIXED[answer.index])


def test_sessions_of_the_same_cache_may_talk_meanwhile():
    model, processor = load("llama")
    expected = [answer_alone(model, processor, request) for request in MIXED]
    chat_cache, texts = ChatCache(), []
    alone = "".join(ChatSession(model, processor).ask("Hm?", max_new_tokens=8))

    def talk():
        for _ in range(5):
            texts.append("".join(ChatSession(model, processor, cache=chat_cache).ask("Hm?", max_new_tokens=8)))

    thread = threading.Thread(target=talk)
    thread.start()
    assert answer_together(model, processor, MIXED, cache=chat_cache) == expected
    thread.join()
    assert texts == [alone] * 5


def test_models_that_cannot_be_batched_are_refused(monkeypatch):
    model, processor = build_text_model("mpt")
    with pytest.raises(ValueError, match="MptModel"):
        BatchedGeneration(model, processor)
    model, processor = load("llama")
    with pytest.raises(ValueError, match="max_rows=0"):
        BatchedGeneration(model, processor, max_rows=0)
    for name, value in (("num_beams", 2), ("prompt_lookup_num_tokens", 3), ("stop_strings", ["a"]), ("max_time", 1.0)):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"out of\s+model.generation_config"):
            patch.setattr(model.generation_config, name, value)
            BatchedGeneration(model, processor)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    monkeypatch.setattr(model.config.text_config, "rope_parameters", rope)
    with pytest.raises(ValueError, match="rows beside it"):
        BatchedGeneration(model, processor)


@pytest.mark.parametrize("row_by_row", [True, False])
@pytest.mark.parametrize("window", [None, 9])
def test_keys_and_values_stay_those_of_their_row_and_within_the_bound(row_by_row, window):
    rng, heads, kv_heads, width = random.Random(0), 4, 2, 8
    row_cache = RowCache(max_rows=5, max_tokens=600, row_by_row=row_by_row, device=torch.device("cpu"))
    rows: list[list[torch.Tensor]] = []
    rooms = set()
    for _ in range(120):
        new = []
        while rng.random() < 0.5:
            length = rng.randrange(1, 60)
            # Now and then one that needs larger slots.
            largest = length + rng.choice((5, 20, 40, 300))
            if not row_cache.has_room([*(item[1] for item in new), largest]):
                break
            new.append((length, largest))
        if not rows and not new:
            continue
        num_running = len(rows)
        positions = row_cache.begin_pass([NewRow(*lengths) for lengths in new])
        lengths = [1] * num_running + [length for length, _ in new]
        query = torch.randn(heads, sum(lengths), width)
        key, value = torch.randn(2, kv_heads, sum(lengths), width)
        attended = row_cache.attend(0, query, key, value, scaling=0.3, window=window)
        rows += [[torch.empty(kv_heads, 0, width)] * 2 for _ in new]
        parts = zip(*(tensor.split(lengths, dim=1) for tensor in (query, key, value)))
        outputs = attended[0].split(lengths)
        for row, (part, output, position) in enumerate(zip(parts, outputs, positions[0].split(lengths))):
            rows[row] = [torch.cat([old, added], dim=1) for old, added in zip(rows[row], part[1:])]
            length = rows[row][0].shape[1]
            assert position.tolist() == list(range(length - lengths[row], length))
            seen = torch.arange(length) <= position[:, None]
            if window is not None:
                seen &= torch.arange(length) > position[:, None] - window
            keys, values = (tensor.repeat_interleave(2, dim=0) for tensor in rows[row])
            expected = scaled_dot_product_attention(part[0], keys, values, attn_mask=seen, scale=0.3)
            torch.testing.assert_close(output.transpose(0, 1), expected)
        slots, _, room, _ = row_cache._layers[0][0].shape
        assert slots * room <= 600 and slots <= 5 and len(rows) <= slots
        rooms.add(room)
        for row in reversed(range(len(rows))):
            # A row never outgrows what it said.
            if rng.random() < 0.2 or row_cache.lengths[row] == row_cache._largest_lengths[row]:
                row_cache.remove(row)
                rows[row] = rows[-1]
                rows.pop()
    assert len(rooms) > 2
