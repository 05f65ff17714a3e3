"""What a request can ask beyond its tokens: texts that end it, probabilities, a form, and what it reuses."""

import json
from functools import cache

import pytest
import torch

from modeling_llava.inference.answer_requests import AnswerRequest, TokenLogprobs
from modeling_llava.inference.batched_generation import BatchedGeneration, generate_answers
from modeling_llava.inference.chat_cache import ChatCache
from modeling_llava.inference.chat_session import ChatSession
from modeling_llava.inference.constraints import Constraint, ConstrainTokens
from tests.modeling_llava.inference.session_models import (
    CAT,
    DOG,
    MODELS,
    assistant,
    build_text_model,
    follow_script,
    user,
)

pytestmark = pytest.mark.core

BATCHED = [name for name in MODELS if name != "mpt"]
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "count": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["color", "count"],
    "additionalProperties": False,
}


@cache
def load(name: str):
    return MODELS[name]()


def answer(model, processor, *requests: AnswerRequest, **settings):
    answers = sorted(generate_answers(model, processor, requests, **settings), key=lambda answer: answer.index)
    for found in answers:
        if found.error is not None:
            raise found.error
    return answers


# Texts that end an answer.


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("sits",), "A cat "),
        (("cat sits", "A dog"), "A "),
        (("t s",), "A ca"),
        (("A",), ""),
        (("mat. T",), "A cat sits on a "),
        (("no such text",), "A cat sits on a mat. The end."),
    ],
)
def test_an_answer_ends_before_the_first_of_its_stops(stop, expected):
    model, processor = build_text_model("llama")
    text = "A cat sits on a mat. The end."
    ids = follow_script(model, processor, text)
    (found,) = answer(model, processor, AnswerRequest([user("What?", CAT)], max_new_tokens=len(ids), stop=stop))
    assert found.text == expected
    assert found.finish_reason == ("length" if expected == text else "stop")
    assert found.ids == ids[: len(found.ids)]
    # No later than the token with the end of the stop.
    assert len(processor.tokenizer.decode(found.ids[:-1])) < len(expected) + max(map(len, stop)) + 1


def test_the_end_of_the_model_is_no_cut():
    model, processor = load("embedded")
    (whole, cut) = answer(
        model,
        processor,
        AnswerRequest([user("What is in the picture?", CAT)], max_new_tokens=200),
        AnswerRequest([user("What is in the picture?", CAT)], max_new_tokens=1),
    )
    assert (whole.finish_reason, cut.finish_reason) == ("stop", "length")
    assert whole.num_prompt_tokens == cut.num_prompt_tokens > 64


# Probabilities.


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 3}, {"constraint": Constraint("x")}])
def test_logprobs_are_those_of_the_model(settings):
    if "constraint" in settings:
        settings = {"constraint": Constraint.choose(["yes", "no"])}
    model, processor = load("llama")
    messages = [user("What is this?", CAT)]
    (found,) = answer(model, processor, AnswerRequest(messages, max_new_tokens=5, logprobs=4, **settings))
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    length = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([found.ids])], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, length - 1 : -1]
    expected = logits.log_softmax(dim=-1)
    assert [part.token for part in found.logprobs] == found.ids
    for part, expected_V in zip(found.logprobs, expected):
        assert part.logprob == pytest.approx(float(expected_V[part.token]), abs=1e-4)
        best = expected_V.topk(4)
        assert [token for token, _ in part.alternatives] == best.indices.tolist()
        assert [value for _, value in part.alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_logprobs_come_only_where_they_are_asked_for():
    model, processor = load("llama")
    found = answer(
        model,
        processor,
        AnswerRequest([user("a")], max_new_tokens=2),
        AnswerRequest([user("a")], max_new_tokens=2, logprobs=0),
    )
    assert found[0].logprobs == []
    assert [type(part) for part in found[1].logprobs] == [TokenLogprobs] * 2
    assert [part.alternatives for part in found[1].logprobs] == [[], []]


# Forms.


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_an_answer_has_its_form(name, temperature):
    model, processor = load(name)
    choices = ["yes", "no", 'a "third" one']
    made = [Constraint.choose(choices), Constraint.follow_schema(SCHEMA)]
    requests = [
        AnswerRequest([user("What?", CAT)], max_new_tokens=60, temperature=temperature, seed=seed, constraint=form)
        for form in made
        for seed in range(3)
    ]
    # Beside one that says what it likes.
    plain = AnswerRequest([user("What?", CAT)], max_new_tokens=20)
    *found, free = answer(model, processor, *requests, plain)
    assert free.ids == answer(model, processor, plain)[0].ids
    for request, part in zip(requests, found):
        assert part.finish_reason == "stop"
        if request.constraint == made[0]:
            assert part.text in choices
        else:
            value = json.loads(part.text)
            assert list(value) == ["color", "count"]
            assert value["color"] in ("red", "blue") and value["count"] in range(100)
    if temperature:
        assert len({part.text for part in found}) > 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constraint.choose([]), "write at least one"),
        (lambda: Constraint.choose(["a", ""]), "list of texts"),
        (lambda: Constraint.choose([1]), "list of texts"),
        (lambda: Constraint.follow_schema("a"), "got a str"),
        (lambda: Constraint.follow_schema({"type": "nonsense"}), "nonsense"),
        (lambda: Constraint.follow_schema({"$ref": "http://localhost:1/a"}), "not fetch"),
        (lambda: Constraint.follow_schema({"type": "string", "pattern": "(("}), "unclosed"),
        (lambda: Constraint.follow_schema({"a": {1, 2}}), "no JSON"),
        (lambda: Constraint.follow_schema({"enum": ["a" * 200_000]}), "at most 100000"),
        (lambda: Constraint.follow_schema({"type": "string", "minLength": 10**12}), "got a schema"),
    ],
)
def test_forms_that_are_none_are_refused_in_a_line(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}])
def test_a_form_that_no_answer_has_is_refused_before_it_joins(schema):
    with pytest.raises(ValueError, match="cannot be followed"):
        answer(*load("llama"), AnswerRequest([user("a")], constraint=Constraint.follow_schema(schema)))


def test_a_form_that_ends_in_the_middle_ends_its_own_request(monkeypatch):
    model, processor = load("llama")
    form = Constraint.follow_schema({"type": "string", "pattern": "x*.{30}y{5}"})
    batch = BatchedGeneration(model, processor)
    plain = AnswerRequest([user("What?", CAT)], max_new_tokens=8)
    batch.add(0, plain)
    batch.add(1, AnswerRequest([user("a")], max_new_tokens=99, constraint=form))
    batch.step()
    # A token that the grammar does not take.
    (guided,) = (part for part in batch.running[1].processors if isinstance(part, ConstrainTokens))
    guided.matcher.consume_tokens([processor.tokenizer.encode("}", add_special_tokens=False)[-1]])
    answers = []
    while batch.num_requests:
        answers += batch.step()
    failed, whole = answers
    assert failed.index == 1 and "cannot be followed" in str(failed.error)
    assert whole.ids == answer(model, processor, plain)[0].ids


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": "a"}, "stop=a"),
        ({"stop": ("a", "")}, "stop="),
        ({"stop": (1,)}, "stop="),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"logprobs": 21}, "logprobs=21"),
        ({"logprobs": True}, "logprobs=True"),
        ({"constraint": "yes"}, "constraint='yes'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError) as caught:
        answer(*load("llama"), AnswerRequest([user("a")], **settings))
    assert message in str(caught.value)


# What is reused.

TURNS = [
    [user("What is this?", CAT)],
    [user("What is this?", CAT), assistant("A cat."), user("And this?", DOG)],
    [user("What is this?", CAT), assistant("A cat."), user("And this?", CAT)],
    [user("What is this?", DOG)],
    [user("Hello")],
    [user("What is this?", CAT)],
]


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("max_rows", [1, 4])
def test_reuse_changes_no_token_and_spares_what_is_known(name, max_rows):
    model, processor = load(name)
    cache = ChatCache()
    requests = [AnswerRequest(turn, max_new_tokens=7, scope=b"one") for turn in TURNS]
    plain = answer(model, processor, *(AnswerRequest(turn, max_new_tokens=7) for turn in TURNS))
    # One after the other, so that each finds what the ones before it have left.
    first = [answer(model, processor, request, cache=cache)[0] for request in requests]
    again = answer(model, processor, *requests, cache=cache, max_rows=max_rows)
    for found in (first, again):
        assert [part.ids for part in found] == [part.ids for part in plain]
    assert [part.num_reused_tokens for part in plain] == [0] * len(TURNS)
    assert first[0].num_reused_tokens == 0
    assert first[1].num_reused_tokens > 64 or name in ("anyres", "transformers")
    for part in again:
        assert part.num_reused_tokens == part.num_prompt_tokens - 1


def test_nothing_is_reused_across_scopes_and_sessions_share_theirs():
    model, processor = load("llama")
    cache = ChatCache()
    messages = [user("What is this?", CAT)]
    ask = {scope: AnswerRequest(messages, max_new_tokens=4, scope=scope) for scope in (b"one", b"two", None)}
    assert answer(model, processor, ask[b"one"], cache=cache)[0].num_reused_tokens == 0
    assert answer(model, processor, ask[b"two"], cache=cache)[0].num_reused_tokens == 0
    assert answer(model, processor, ask[None], cache=cache)[0].num_reused_tokens == 0
    assert answer(model, processor, ask[b"one"], cache=cache)[0].num_reused_tokens > 0
    session = ChatSession(model, processor, cache=cache, scope=b"two")
    text = "".join(session.answer(messages, max_new_tokens=4))
    assert session.statistics.num_reused_tokens > 0
    assert text == answer(model, processor, ask[b"one"], cache=cache)[0].text


def test_a_request_that_leaves_makes_room():
    model, processor = load("llama")
    batch = BatchedGeneration(model, processor, max_rows=2)
    for index in range(4):
        batch.add(index, AnswerRequest([user("a")], max_new_tokens=3 + index))
    batch.step()
    assert [row.index for row in batch.running] == [0, 1]
    for index in (0, 3, 99):
        batch.leave(index)
    answers = []
    while batch.num_requests:
        answers += batch.step()
    assert sorted(found.index for found in answers) == [1, 2]
    for found in answers:
        expected = answer(model, processor, AnswerRequest([user("a")], max_new_tokens=3 + found.index))
        assert found.ids == expected[0].ids
