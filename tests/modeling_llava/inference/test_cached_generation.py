"""What turns and sessions reuse: the tokens of `generate`, for the price of the new ones."""

from types import SimpleNamespace

import PIL.Image
import pytest
from transformers import GenerationConfig, LlamaConfig, Qwen3NextConfig

from modeling_llava.inference.cached_generation import build_cache
from modeling_llava.inference.chat_cache import ChatCache
from modeling_llava.inference.chat_session import ChatSession
from tests.modeling_llava.inference.session_models import (
    CAT,
    DOG,
    MODELS,
    SETTINGS,
    assistant,
    build_text_model,
    load,
    make_picture,
    read,
    user,
)
from tests.tiny import tiny_processor


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


def test_the_tower_does_not_run_for_cached_tokens_when_features_were_dropped(watched):
    seen = watched("llama")
    large = ChatSession(seen.model, seen.processor)
    read(large.ask("What?", images=[CAT], **SETTINGS))
    session = ChatSession(seen.model, seen.processor, cache=ChatCache(max_bytes=large.cache.num_bytes - 1))
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
    # Another system text makes the KV cache useless, so that the features are looked for.
    seen.tower_runs = 0
    for scope, num_runs in ((b"ada", 0), (b"eve", 1)):
        session = ChatSession(seen.model, seen.processor, cache=shared, scope=scope, system="Rhyme.")
        read(session.answer([user("What?", CAT)], **SETTINGS))
        assert seen.tower_runs == num_runs


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


def test_a_cache_from_before_a_window_was_full_stays_useful(watched, monkeypatch):
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


def test_a_recurrent_cache_is_not_reused():
    assert build_cache(SimpleNamespace(config=Qwen3NextConfig(), generation_config=GenerationConfig())) is None


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
    assert build_cache(model) is None
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert build_cache(model) is not None
