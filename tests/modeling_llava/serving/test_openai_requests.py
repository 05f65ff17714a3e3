"""Bodies of strangers: each becomes requests of the engine, or a RequestError of one line that names a field."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_llava.inference.answer_requests import AnswerRequest
from modeling_llava.serving.openai_requests import (
    Call,
    RequestError,
    RequestLimits,
    read_chat,
    read_json,
    read_responses,
)

LIMITS = RequestLimits(max_new_tokens=500, max_messages=5, max_characters=1000, max_pictures=2)
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
CHAT = {
    "model": "embedded",
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [PICTURE, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And now?"},
    ],
    "max_completion_tokens": 20,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 3,
    "n": 2,
    "stop": ["a", "b"],
    "logprobs": True,
    "top_logprobs": 4,
    "stream": True,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}},
    "user": "me",
    "tools": [],
}
RESPONSES = {
    "model": "embedded",
    "input": [
        {
            "type": "message",
            "role": "user",
            "content": [
                {"type": "input_text", "text": "What is this?"},
                {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "auto"},
            ],
        }
    ],
    "instructions": "Be short.",
    "max_output_tokens": 20,
    "temperature": 0,
    "text": {"format": {"type": "text"}},
    "stream": False,
    "store": False,
}
READERS = {"chat": (read_chat, CHAT), "responses": (read_responses, RESPONSES)}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=5),
    st.sampled_from(
        ["user", "system", "text", "image_url", "input_image", "json_object", "x" * 2000, "\n\n", 10**400]
    ),
    st.lists(st.one_of(st.none(), st.integers(), st.text(max_size=3)), max_size=6),
    st.dictionaries(
        st.sampled_from(["type", "role", "content", "text", "url", "schema", "a\nb"]), st.text(max_size=3)
    ),
    st.sampled_from([PICTURE, [PICTURE] * 3, CHAT["messages"], CHAT["messages"] * 2, CHAT["response_format"]]),
)


def list_places(value, path=()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in list_places(item, (*path, key)))]


def test_what_is_asked_is_what_the_engine_gets():
    call = read_chat(CHAT, scope=b"me", limits=LIMITS)
    assert (call.model, call.stream, call.include_usage) == ("embedded", True, True)
    first, second = call.requests
    assert (first.seed, second.seed) == (3, 4)
    assert (first.max_new_tokens, first.temperature, first.top_p, first.stop) == (20, 0.5, 0.9, ("a", "b"))
    assert (first.logprobs, first.scope) == (4, b"me") and first.constraint is not None
    assert first.messages[1]["content"] == [
        {"type": "image", "image": "data:image/png;base64,AAAA"},
        {"type": "text", "text": "What is this?"},
    ]
    (request,) = read_responses(RESPONSES, scope=b"", limits=LIMITS).requests
    assert [message["role"] for message in request.messages] == ["system", "user"]
    assert [item["type"] for item in request.messages[1]["content"]] == ["text", "image"]
    (plain,) = read_chat(
        {"model": "a", "messages": [{"role": "user", "content": "a"}]}, scope=b"", limits=LIMITS
    ).requests
    assert (plain.temperature, plain.logprobs, plain.constraint) == (0, None, None)


@pytest.mark.parametrize("kind", READERS)
@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_every_change_of_a_body_is_taken_or_refused_in_a_line(kind, data):
    read, body = READERS[kind]
    body = copy.deepcopy(body)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(list_places(body)[1:]))
        holder = body
        for key in place[:-1]:
            holder = holder[key]
        change = data.draw(st.sampled_from(["replace", "add", "remove"]))
        if change == "replace":
            holder[place[-1]] = copy.deepcopy(data.draw(VALUES))
        elif change == "remove":
            del holder[place[-1]]
        elif isinstance(holder, dict):
            holder[data.draw(st.text(max_size=8))] = copy.deepcopy(data.draw(VALUES))
        else:
            holder.append(copy.deepcopy(data.draw(VALUES)))
        if not body:
            return
    try:
        call = read(body, scope=b"", limits=LIMITS)
    except RequestError as error:
        assert error.status == 400
        message = str(error)
        assert message.startswith("got ") and "\n" not in message and len(message) < 600
        json.dumps([error.param, message])
        return
    assert isinstance(call, Call) and isinstance(call.model, str)
    for request in call.requests:
        assert isinstance(request, AnswerRequest)
        request.check()
        contents = [message["content"] for message in request.messages if isinstance(message["content"], list)]
        texts = [item.get("text", "") for content in contents for item in content]
        assert sum(map(len, texts)) <= LIMITS.max_characters
        assert request.max_new_tokens <= LIMITS.default_new_tokens


@given(body=st.binary(max_size=40))
def test_bodies_that_are_no_object_are_refused(body):
    try:
        assert isinstance(read_json(body), dict)
    except RequestError as error:
        assert str(error).startswith("got ")
