"""ChatSession: streams, settings, refusals, and sessions that share a model."""

import copy
import signal
import threading
import time

import pytest
import torch

from modeling_llava.inference.answer_requests import AnswerRequest
from modeling_llava.inference.batched_generation import generate_answers
from modeling_llava.inference.chat_cache import ChatCache
from modeling_llava.inference.chat_session import ChatSession
from processing_llava.image_limits import ImageLimits
from processing_llava.templates import load_template
from tests.modeling_llava.inference.session_models import (
    CAT,
    DOG,
    SETTINGS,
    assistant,
    build_text_model,
    follow_script,
    load,
    make_picture,
    read,
    user,
)

pytestmark = pytest.mark.core


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


def test_sampling_repeats_with_its_seed_as_in_generate_and_leaves_the_global_generator_alone(watched):
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


def test_a_session_keeps_what_the_tower_sees_of_pictures():
    session = ChatSession(*load("llama"))
    read(session.ask("What?", images=[CAT, CAT.resize((900, 700))], **SETTINGS))
    kept = [item["image"] for item in session.messages[0]["content"] if item["type"] == "image"]
    assert [type(picture).__name__ for picture in kept] == ["CutImage"] * 2
    assert [picture.size for picture in kept] == [(CAT.height, CAT.width), (700, 900)]


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


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "1"}, "temperature='1'"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"seed": None}, "seed=None"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        read(ChatSession(*load("llama")).ask("What?", **settings))


@pytest.mark.parametrize("question, images", [("What?", b"1"), (None, [])])
def test_a_question_of_another_kind_is_refused(question, images):
    with pytest.raises(ValueError, match="expected a question and a list of pictures"):
        read(ChatSession(*load("llama")).ask(question, images=images))


@pytest.mark.parametrize("name, value", [("num_beams", 2), ("prompt_lookup_num_tokens", 3), ("stop_strings", ["a"])])
def test_a_model_that_is_to_do_more_than_one_token_at_a_time_is_refused(name, value, monkeypatch):
    session = ChatSession(*load("llama"))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="or call model.generate"):
        patch.setattr(session.model.generation_config, name, value)
        read(session.ask("What?"))
    assert read(session.ask("What?", **SETTINGS))


@pytest.mark.parametrize(
    "template, expected", [("llava_v0", "A cat.##, no"), ("llava_v1", "A cat.##, no###Human: Wh")]
)
def test_an_answer_ends_where_the_format_ends_it(template, expected):
    model, processor = build_text_model("llama")
    processor.chat_template = load_template(template)
    ids = follow_script(model, processor, "A cat.##, no###Human: What else is there, and who?")
    session = ChatSession(model, processor)
    text = read(session.ask("What is this?", images=[CAT], max_new_tokens=len(ids)))
    assert text.startswith(expected) and (text == expected) == (template == "llava_v0")
    assert (session.statistics.num_new_tokens < len(ids)) == (template == "llava_v0")


def test_an_answer_ends_with_the_token_that_ends_it_in_the_format(monkeypatch):
    """Whatever the model says of itself, as where `template` chooses another format."""
    model, processor = build_text_model("llama")
    monkeypatch.setattr(model.generation_config, "eos_token_id", processor.tokenizer.pad_token_id)
    ids = follow_script(model, processor, "A cat.</s>USER: What else?")
    messages = [user("What is this?", CAT)]
    assert read(ChatSession(model, processor).answer(messages, max_new_tokens=len(ids))) == "A cat."
    follow_script(model, processor, "A cat.</s>USER: What else?")
    (answer,) = generate_answers(model, processor, [AnswerRequest(messages, max_new_tokens=len(ids))])
    assert answer.text == "A cat." and answer.ids[-1] == processor.tokenizer.eos_token_id


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "at least one"),
        (None, "got the conversation None"),
        (user("What?"), "got the conversation {"),
        ([{"content": "hi"}], "got message . with {"),
        ([[user("What?")]], r"got message . with \["),
        ([user("What?"), assistant("A cat.")], "last from the user"),
    ],
)
def test_a_conversation_that_cannot_be_answered_is_refused(messages, message, system):
    with pytest.raises(ValueError, match=message):
        read(ChatSession(*load("llama"), system=system).answer(messages))


def test_an_answer_that_ends_after_a_reset_is_not_remembered():
    session = ChatSession(*load("llama"))
    answer = session.ask("What?", **SETTINGS)
    next(answer)
    session.reset()
    assert read(answer)
    assert session.messages == []


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
