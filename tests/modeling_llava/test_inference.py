"""ChatSession: the tokens of `generate`, for the price of the new ones; and sessions that share a model."""

import copy
import signal
import threading
import time
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from unittest.mock import Mock

import PIL.Image
import pytest
import torch
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen3NextConfig,
)

from modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.cached_generation import CachedGeneration, build_states
from modeling_llava.chat_cache import ChatCache
from modeling_llava.inference import EMBEDDED_MODEL, ChatSession, load_for_inference
from processing_llava.image_limits import ImageLimits
from tests.original_folders import widen
from tests.tiny import (
    PATCH_SIZE,
    PINPOINTS,
    TEXT_CONFIGS,
    TILE_SIZE,
    VISION_CONFIGS,
    VOCAB_SIZE,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)


def make_picture(width: int, height: int, *, seed: int = 0) -> PIL.Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8, generator=generator)
    return PIL.Image.fromarray(pixels.numpy()).resize((width, height))


CAT, DOG = make_picture(60, 40, seed=1), make_picture(30, 70, seed=2)
SETTINGS = {"max_new_tokens": 6}


def build_text_model(text: str, *, sliding_window: int | None = None):
    processor = tiny_processor()
    model = tiny_model(text, image_token_id=processor.image_token_id)
    if text == "mistral":
        model.config.text_config.sliding_window = sliding_window
    return model, processor


def build_anyres():
    tiled = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS, "patch_merge_type": "spatial_unpad"}
    processor = tiny_processor(**tiled)
    del tiled["image_aspect_ratio"]
    return tiny_model(image_token_id=processor.image_token_id, **tiled), processor


def build_transformers_own():
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = TEXT_CONFIGS["llama"]()
    text.vocab_size = VOCAB_SIZE + 1
    config = LlavaConfig(vision_config=VISION_CONFIGS["clip"](), text_config=text, image_token_id=VOCAB_SIZE)
    model = LlavaForConditionalGeneration(config)
    widen(model)
    ours = tiny_processor()
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": TILE_SIZE}, crop_size=TILE_SIZE),
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=ours.chat_template,
    )
    return model.eval(), processor


MODELS: dict[str, Callable] = {
    "embedded": load_for_inference,
    "anyres": build_anyres,
    "transformers": build_transformers_own,
    **{
        text: lambda text=text: build_text_model(text) for text in ("llama", "mistral", "qwen3", "mpt", "phi", "gemma")
    },
}


@cache
def load(name: str):
    return MODELS[name]()


@pytest.fixture
def watched(monkeypatch):
    """Watch the model of a name: the ids of its last generation, how often its tower ran, and plain `generate`."""

    def watch(name: str) -> SimpleNamespace:
        model, processor = load(name)
        seen = SimpleNamespace(model=model, processor=processor, tower_runs=0, num_tiles=0, ids=None)
        generate = model.generate

        def record(**kwargs):
            output = generate(**kwargs)
            seen.ids = output[0, kwargs["input_ids"].shape[1] :].tolist()
            return output

        def expect(messages: list, **settings) -> list[int]:
            inputs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            output = generate(**inputs, **{"do_sample": False} | SETTINGS | settings)
            seen.tower_runs = seen.num_tiles = 0
            return output[0, inputs["input_ids"].shape[1] :].tolist()

        def count(module, arguments, output) -> None:
            seen.tower_runs += 1
            seen.num_tiles += len(output.last_hidden_state)

        seen.expect = expect
        monkeypatch.setattr(model, "generate", record)
        hooks.append(model.model.vision_tower.register_forward_hook(count))
        return seen

    hooks = []
    yield watch
    for hook in hooks:
        hook.remove()


def user(text: str, *images) -> dict:
    content = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def read(answer) -> str:
    return "".join(answer)


@pytest.mark.parametrize("name", MODELS)
def test_five_turns_give_the_tokens_of_generate(name, watched):
    seen = watched(name)
    session = ChatSession(seen.model, seen.processor, system="Be brief.")
    num_asked = num_known = 0
    for turn, images in enumerate([[CAT], [], [DOG], [], []]):
        question = f"What {turn}?"
        expected = seen.expect([*session.messages, user(question, *images)])
        text = read(session.ask(question, images=images, **SETTINGS))
        assert seen.ids == expected
        assert text == seen.processor.tokenizer.decode(expected, skip_special_tokens=True).lstrip()
        assert session.messages[-1] == assistant(text)
        assert seen.tower_runs == len(images)
        statistics = session.statistics
        # The answers of random weights are split into other tokens than they were generated in.
        known = num_known if name == "embedded" else num_asked
        assert statistics.num_reused_tokens == known
        assert statistics.num_new_tokens == len(expected)
        num_asked = statistics.num_prompt_tokens
        num_known = num_asked + statistics.num_new_tokens - 1
    assert len(session.messages) == 11


@pytest.mark.parametrize("name", ["llama", "anyres", "transformers"])
def test_edits_branches_and_retries_pay_only_for_what_differs(name, watched):
    seen = watched(name)
    shared = ChatCache()
    session = ChatSession(seen.model, seen.processor, cache=shared)
    start = [user("What is this?", CAT), assistant("A cat.")]
    branches = {
        "original": [*start, user("Is it big?", DOG), assistant("No."), user("Sure?")],
        "edit of turn 2": [*start, user("Is it small?", DOG), assistant("Yes."), user("Sure?")],
        "undo": [*start, user("Is it big?", DOG)],
        "retry": [*start, user("Is it big?", DOG), assistant("No."), user("Sure?")],
        "other picture of the same size": [user("What is this?", CAT.rotate(180)), *start[1:], user("Is it big?")],
        "same picture twice": [user("What is this?", CAT, CAT), *start[1:], user("Is it big?")],
    }
    tower_runs = {"original": 1, "other picture of the same size": 1}
    for kind, messages in branches.items():
        expected = seen.expect(messages)
        read(session.answer(messages, **SETTINGS))
        assert seen.ids == expected, kind
        assert seen.tower_runs == tower_runs.get(kind, 0), kind
    assert session.messages == []
    for messages in branches.values():
        other = ChatSession(seen.model, seen.processor, cache=shared)
        read(other.answer(messages, **SETTINGS))
        assert other.statistics.num_reused_tokens == other.statistics.num_prompt_tokens - 1


@pytest.mark.parametrize("name", ["llama", "anyres", "transformers"])
def test_another_system_text_costs_no_run_of_the_tower(name, watched):
    seen = watched(name)
    session = ChatSession(seen.model, seen.processor)
    for system in ("Be brief.", "Rhyme."):
        messages = [{"role": "system", "content": system}, user("What are these?", CAT, DOG, CAT)]
        expected = seen.expect(messages)
        read(session.answer(messages, **SETTINGS))
        assert seen.ids == expected
    assert seen.tower_runs == 0
    assert session.statistics.num_reused_tokens < 10


def test_the_tower_does_not_run_for_known_states_when_features_were_dropped(watched):
    seen = watched("llama")
    roomy = ChatSession(seen.model, seen.processor)
    read(roomy.ask("What?", images=[CAT], **SETTINGS))
    session = ChatSession(seen.model, seen.processor, cache=ChatCache(max_bytes=roomy.cache.num_bytes - 1))
    read(session.ask("What?", images=[CAT], **SETTINGS))
    expected = seen.expect([*session.messages, user("Sure?")])
    read(session.ask("Sure?", **SETTINGS))
    assert seen.ids == expected
    assert seen.tower_runs == 0


def test_pictures_of_different_sizes_are_recognised_in_other_company(watched):
    seen = watched("anyres")
    session = ChatSession(seen.model, seen.processor)
    wide = make_picture(90, 30)  # in fewer tiles than the other, so that it is padded beside that one
    read(session.ask("What?", images=[wide], **SETTINGS))
    expected = seen.expect([user("Both?", CAT, wide)])
    read(session.answer([user("Both?", CAT, wide)], **SETTINGS))
    assert seen.ids == expected
    read(session.answer([user("And both?", wide, CAT)], **SETTINGS))
    assert (seen.tower_runs, seen.num_tiles) == (1, 5)


def test_equal_pixels_of_pictures_of_different_sizes_are_two_pictures(watched):
    seen = watched("anyres")
    session = ChatSession(seen.model, seen.processor)
    for size in ((56, 56), (56, 44)):
        messages = [{"role": "system", "content": f"{size}"}, user("What?", PIL.Image.new("RGB", size))]
        expected = seen.expect(messages)
        read(session.answer(messages, **SETTINGS))
        assert seen.ids == expected


def test_a_prompt_that_ends_in_a_picture_is_answered_again(watched):
    seen = watched("llama")
    template = "{% for m in messages %}{% for c in m.content %}<image>{% endfor %}{% endfor %}"
    processor = tiny_processor()
    processor.chat_template = template
    session = ChatSession(seen.model, processor)
    messages = [{"role": "user", "content": [{"type": "image", "image": CAT}]}]
    first = read(session.answer(messages, **SETTINGS)), seen.ids
    assert (read(session.answer(messages, **SETTINGS)), seen.ids) == first
    assert session.statistics.num_reused_tokens == session.statistics.num_prompt_tokens - 1


def test_what_was_kept_under_another_scope_is_not_found(watched):
    seen = watched("llama")
    shared = ChatCache()
    expected = seen.expect([user("What?", CAT)])
    reused = []
    for scope in (b"", b"ada", b"bob", b"ada", b""):
        session = ChatSession(seen.model, seen.processor, cache=shared, scope=scope)
        read(session.answer([user("What?", CAT)], **SETTINGS))
        assert seen.ids == expected
        reused.append(session.statistics.num_reused_tokens)
    known = session.statistics.num_prompt_tokens - 1
    assert reused == [0, 0, 0, known, known]
    # Another system text makes the states useless, so that the features are looked for.
    seen.tower_runs = 0
    for scope, num_runs in ((b"ada", 0), (b"eve", 1)):
        session = ChatSession(seen.model, seen.processor, cache=shared, scope=scope, system="Rhyme.")
        read(session.answer([user("What?", CAT)], **SETTINGS))
        assert seen.tower_runs == num_runs


def test_statistics_count_what_they_say(watched):
    seen = watched("llama")
    session = ChatSession(seen.model, seen.processor)
    read(session.ask("What?", images=[CAT, DOG], **SETTINGS))
    first = session.statistics
    assert (first.num_image_tokens, first.num_reused_tokens) == (2 * 16, 0)
    assert first.seconds_to_first_token > 0
    assert first.tokens_per_second > 0
    read(session.ask("And?", max_new_tokens=1))
    second = session.statistics
    assert second.num_prompt_tokens > first.num_prompt_tokens
    assert (second.num_image_tokens, second.num_new_tokens, second.tokens_per_second) == (2 * 16, 1, 0)


@pytest.mark.parametrize("window", [8, 4096])
def test_a_sliding_window_is_reused_only_until_it_is_full(window, watched, monkeypatch):
    monkeypatch.setitem(MODELS, "sliding", lambda: build_text_model("mistral", sliding_window=window))
    load.cache_clear()
    seen = watched("sliding")
    session = ChatSession(seen.model, seen.processor)
    for question, images in (("What?", [CAT]), ("Sure?", []), ("Really?", [])):
        expected = seen.expect([*session.messages, user(question, *images)])
        read(session.ask(question, images=images, **SETTINGS))
        assert seen.ids == expected
        assert seen.tower_runs == len(images)
    assert (session.statistics.num_reused_tokens > 0) == (window == 4096)


def test_states_from_before_a_window_was_full_stay_useful(watched, monkeypatch):
    monkeypatch.setitem(MODELS, "sliding", lambda: build_text_model("mistral", sliding_window=200))
    load.cache_clear()
    seen = watched("sliding")
    session = ChatSession(seen.model, seen.processor)
    reused = []
    for _ in range(4):
        expected = seen.expect([*session.messages, user("What is the matter with this?")])
        read(session.ask("What is the matter with this?", **SETTINGS))
        assert seen.ids == expected
        reused.append(session.statistics.num_reused_tokens)
    assert session.statistics.num_prompt_tokens > 200
    assert reused == sorted(reused) and 0 < reused[-1] < 200


def test_a_model_saved_without_use_cache_is_as_fast_as_others(watched, monkeypatch):
    """Training with gradient checkpointing leaves such configurations behind."""
    seen = watched("llama")
    monkeypatch.setattr(seen.model.generation_config, "use_cache", False)
    session = ChatSession(seen.model, seen.processor)
    for _ in range(2):
        expected = seen.expect([*session.messages, user("What?", CAT)])
        read(session.ask("What?", images=[CAT], **SETTINGS))
        assert seen.ids == expected
    assert session.statistics.num_reused_tokens > 0


def test_other_caches_are_left_to_generate(watched, monkeypatch):
    seen = watched("qwen3")
    monkeypatch.setattr(seen.model.generation_config, "cache_implementation", "static")
    session = ChatSession(seen.model, seen.processor)
    for _ in range(2):
        expected = seen.expect([*session.messages, user("What?", CAT)])
        read(session.ask("What?", images=[CAT], **SETTINGS))
        assert seen.ids == expected
    assert session.statistics.num_reused_tokens == 0
    assert seen.tower_runs == 0


def test_drawing_repeats_with_its_seed_as_in_generate_and_leaves_the_global_generator_alone(watched):
    seen = watched("llama")
    session = ChatSession(seen.model, seen.processor)
    messages = [user("What?", CAT)]
    answers = []
    for seed in (3, 4, 3):
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 0}
        expected = seen.expect(messages, **sampling)
        state = torch.get_rng_state()
        answers.append(read(session.answer(messages, temperature=1.5, top_p=0.9, seed=seed, **SETTINGS)))
        assert seen.ids == expected
        assert torch.equal(torch.get_rng_state(), state)
    assert answers[0] == answers[2] != answers[1]


def test_a_closed_answer_stops_within_a_token_and_is_not_remembered(watched):
    seen = watched("llama")
    session = ChatSession(seen.model, seen.processor)
    read(session.ask("What?", images=[CAT], **SETTINGS))
    remembered, before = list(session.messages), session.statistics
    threads = threading.active_count()
    answer = session.ask("Tell me all.", max_new_tokens=400, temperature=9.0)
    next(answer)
    answer.close()
    assert threading.active_count() == threads
    assert len(seen.ids) < 100
    assert not session.cache.lock.locked()
    assert session.messages == remembered
    assert session.statistics is not before
    expected = seen.expect([*remembered, user("Tell me all.")])
    read(session.ask("Tell me all.", **SETTINGS))
    assert seen.ids == expected
    assert session.statistics.num_reused_tokens == session.statistics.num_prompt_tokens - 1


def test_an_answer_that_nobody_reads_holds_up_nobody(watched):
    seen = watched("llama")
    shared = ChatCache()
    abandoned = ChatSession(seen.model, seen.processor, cache=shared).ask("What?", max_new_tokens=20, temperature=9.0)
    next(abandoned)
    read(ChatSession(seen.model, seen.processor, cache=shared).ask("What?", **SETTINGS))
    abandoned.close()


def test_ctrl_c_leaves_while_another_answer_is_running(watched):
    seen = watched("llama")
    session = ChatSession(seen.model, seen.processor)
    main = threading.main_thread().ident
    # Shells start background jobs with the signal ignored, and Python leaves it so.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    threads = threading.active_count()
    started = time.perf_counter()
    session.cache.lock.acquire()
    timers = [
        threading.Timer(0.5, signal.pthread_kill, (main, signal.SIGINT)),
        threading.Timer(10, session.cache.lock.release),
    ]
    for timer in timers:
        timer.start()
    with pytest.raises(KeyboardInterrupt):
        read(session.ask("What?", **SETTINGS))
    signal.signal(signal.SIGINT, handler)
    assert time.perf_counter() - started < 5
    timers[1].cancel()
    for timer in timers:
        timer.join()
    assert threading.active_count() == threads


def test_an_error_of_the_model_is_raised_and_the_session_goes_on(watched, monkeypatch):
    seen = watched("llama")
    session = ChatSession(seen.model, seen.processor)

    def fail(*arguments):
        raise RuntimeError("out of memory")

    hook = seen.model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        read(session.ask("What?", images=[CAT], **SETTINGS))
    hook.remove()
    assert session.messages == []
    expected = seen.expect([user("What?", CAT)])
    read(session.ask("What?", images=[CAT], **SETTINGS))
    assert seen.ids == expected


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_ten_sessions_at_once_answer_as_each_would_alone(temperature):
    model, processor = load("llama")
    pictures = [make_picture(40, 40, seed=number) for number in range(10)]

    def talk(number: int, session: ChatSession) -> list[str]:
        settings = {**SETTINGS, "temperature": temperature, "seed": number}
        return [
            read(session.ask("What?", images=[pictures[number]], **settings)),
            read(session.ask(f"Is it {number}?", **settings)),
            read(session.ask("Sure?", images=[pictures[-number]], **settings)),
        ]

    alone = [talk(number, ChatSession(model, processor)) for number in range(10)]
    # Room for about two of them, so that they push each other out.
    shared = ChatCache(max_bytes=200_000)
    together: dict[int, list[str]] = {}

    def run(number: int) -> None:
        together[number] = talk(number, ChatSession(model, processor, cache=shared))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(10)] == alone
    assert len({tuple(answers) for answers in alone}) > 5
    assert 0 < shared.num_bytes <= shared.max_bytes


def test_models_whose_pictures_cannot_be_told_apart_answer_without_reuse(watched, monkeypatch):
    seen = watched("transformers")
    monkeypatch.setattr(seen.model.config, "model_type", "llava_next")
    session = ChatSession(seen.model, seen.processor)
    for question, images in (("What?", [CAT]), ("Sure?", [])):
        expected = seen.expect([*session.messages, user(question, *images)])
        read(session.ask(question, images=images, **SETTINGS))
        assert seen.ids == expected
        assert session.statistics.num_reused_tokens == 0


def test_pictures_of_different_sizes_in_transformers_own_class_are_left_to_generate(watched, monkeypatch):
    """As a Pixtral tower has them: the number of tokens of each is not known."""
    seen = watched("transformers")
    monkeypatch.setattr(seen.model, "generate", passed := Mock(spec=seen.model.generate))
    inputs = seen.processor(text="<image>", images=CAT, return_tensors="pt")
    inputs["image_sizes"] = torch.tensor([[28, 28]])
    cache = ChatCache()
    CachedGeneration(seen.model, inputs, cache).run(max_new_tokens=1)
    assert passed.call_args.kwargs == {**inputs, "max_new_tokens": 1}
    assert cache.num_bytes == 0


def test_recurrent_states_are_not_reused():
    assert build_states(SimpleNamespace(config=Qwen3NextConfig(), generation_config=GenerationConfig())) is None


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        {"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}},
    ],
)
def test_positions_that_depend_on_the_length_are_computed_again(rope):
    config = LlamaConfig()
    config.rope_parameters = rope
    model = SimpleNamespace(config=config, generation_config=GenerationConfig())
    assert build_states(model) is None
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert build_states(model) is not None


@pytest.mark.parametrize(
    "settings, message",
    [({"temperature": -1}, "temperature=-1"), ({"top_p": 0.0}, "top_p=0.0"), ({"top_p": 1.5}, "top_p=1.5")],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        read(ChatSession(*load("llama")).ask("What?", **settings))


def test_a_conversation_that_does_not_end_with_the_user_is_refused():
    session = ChatSession(*load("llama"))
    for messages in ([], [user("What?"), assistant("A cat.")]):
        with pytest.raises(ValueError, match="last from the user"):
            read(session.answer(messages))


def test_a_conversation_longer_than_the_model_can_read_is_refused(watched):
    seen = watched("llama")
    session = ChatSession(seen.model, seen.processor)
    limit = seen.model.config.text_config.max_position_embeddings
    with pytest.raises(ValueError, match=f"expected fewer than {limit}"):
        list(session.ask("What is this? " * limit))
    assert len(session.messages) == 0


@pytest.mark.parametrize("name, limit", [("llama", "max_position_embeddings"), ("mpt", "max_seq_len")])
def test_an_answer_ends_where_the_model_can_read_no_more(name, limit, watched, monkeypatch):
    seen = watched(name)
    session = ChatSession(seen.model, seen.processor)
    expected = seen.expect([user("What?", CAT)])
    read(session.answer([user("What?", CAT)], **SETTINGS))
    num_prompt_tokens = session.statistics.num_prompt_tokens
    monkeypatch.setattr(seen.model.config.text_config, limit, num_prompt_tokens + 2)
    read(session.answer([user("What?", CAT)], **SETTINGS))
    assert seen.ids == expected[:2]
    monkeypatch.setattr(seen.model.config.text_config, limit, num_prompt_tokens)
    with pytest.raises(ValueError, match=f"expected fewer than {num_prompt_tokens}"):
        read(session.answer([user("What?", CAT)], **SETTINGS))


def test_a_text_is_no_path_of_a_picture(tmp_path):
    path = tmp_path / "cat.png"
    CAT.save(path)
    session = ChatSession(*load("llama"))
    with pytest.raises(ValueError, match="no text opens a file"):
        read(session.ask("What?", images=[str(path)], **SETTINGS))
    answers = []
    for image in (CAT, path, path.read_bytes()):
        session.reset()
        answers.append(read(session.ask("What?", images=[image], **SETTINGS)))
    assert answers == answers[:1] * 3


def test_the_limits_of_the_processor_count():
    model, processor = load("llama")
    processor = copy.deepcopy(processor)
    processor.image_processor.limits = ImageLimits(max_side=10)
    with pytest.raises(ValueError, match="max_side"):
        read(ChatSession(model, processor).ask("What?", images=[CAT], **SETTINGS))


def test_the_system_text_counts_for_both_ways_to_ask(watched):
    seen = watched("llama")
    session = ChatSession(seen.model, seen.processor, system="Be brief.")
    expected = seen.expect([{"role": "system", "content": "Be brief."}, user("What?")])
    read(session.ask("What?", **SETTINGS))
    assert seen.ids == expected
    read(session.answer([user("What?")], **SETTINGS))
    assert seen.ids == expected
    session.reset()
    assert session.messages == [{"role": "system", "content": "Be brief."}]


def test_loading_goes_where_it_is_told():
    model, _ = load_for_inference(EMBEDDED_MODEL, device="cpu")
    assert (type(model), model.device.type, model.dtype) == (AnyLlavaForConditionalGeneration, "cpu", torch.float32)
    assert not model.training
