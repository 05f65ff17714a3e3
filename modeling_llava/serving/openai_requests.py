"""What clients of OpenAI's API send, as requests of the engine; everything else is refused, and nothing is ignored.

What is surprising: answers are greedy unless a request says otherwise, where OpenAI samples at temperature 1. A
picture is shown as the model's processor shows every picture, whatever its `detail`.
"""

import json
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from modeling_llava.inference.answer_requests import MAX_LOGPROBS, AnswerRequest
from modeling_llava.inference.constraints import Constraint

MAX_CHOICES = 8
MAX_STOPS = 4
MAX_SEED = 2**63 - 1
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
CHAT_TEXTS = ("text",)
RESPONSES_TEXTS = ("input_text", "output_text", "text")


class RequestError(ValueError):
    """What a client got wrong.

    Args:
        message: One sentence.
        param: The field.
        status: Of HTTP.
        code: OpenAI's word for it.
    """

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


@dataclass(frozen=True)
class RequestLimits:
    """What one request may hold."""

    max_new_tokens: int = 4096
    default_new_tokens: int = 1024
    max_messages: int = 1000
    max_characters: int = 400_000
    max_pictures: int = 32


@dataclass(frozen=True)
class Call:
    """A request for one or more answers to one conversation."""

    model: str
    requests: list[AnswerRequest]
    """One for each choice."""
    stream: bool
    include_usage: bool = False
    """Whether a stream ends with what it took."""
    instructions: str | None = None
    """Of `/v1/responses`, which tells them back."""


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a body is.

    Raises:
        RequestError: if it is none.
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"got a body that is no JSON ({type(error).__name__}); expected an object") from None
    if not isinstance(value, dict):
        raise RequestError(f"got a JSON {type(value).__name__}; expected an object")
    return value


def read_chat(body: dict[str, Any], *, scope: bytes, limits: RequestLimits) -> Call:
    """What `/v1/chat/completions` is asked.

    Args:
        body: The request.
        scope: Whose earlier conversations the answer may start from.
        limits: What it may hold.

    Raises:
        RequestError: naming the field that is missing, wrong or unknown.
    """
    fields = _Fields(body)
    model = fields.take_text("model", needed=True)
    messages = _read_messages(fields.take("messages"), "messages", texts=CHAT_TEXTS, limits=limits)
    tokens = fields.take_number("max_completion_tokens", 1, limits.max_new_tokens, whole=True)
    older = fields.take_number("max_tokens", 1, limits.max_new_tokens, whole=True)
    if tokens is not None and older is not None and tokens != older:
        raise RequestError("got max_tokens beside max_completion_tokens; expected one of them", param="max_tokens")
    num_choices = fields.take_number("n", 1, MAX_CHOICES, whole=True) or 1
    stop = fields.take("stop")
    stop = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stop, list) or len(stop) > MAX_STOPS or not all(isinstance(text, str) and text for text in stop):
        raise RequestError(f"got another stop; expected a text or at most {MAX_STOPS} of them", param="stop")
    wants_logprobs = fields.take_flag("logprobs")
    top = fields.take_number("top_logprobs", 0, MAX_LOGPROBS, whole=True)
    if top is not None and not wants_logprobs:
        raise RequestError("got top_logprobs without logprobs; expected logprobs: true", param="top_logprobs")
    stream = fields.take_flag("stream")
    options = fields.take("stream_options")
    include_usage = False
    if options is not None:
        if not stream or not isinstance(options, dict) or options.keys() - {"include_usage"}:
            raise RequestError(
                "got other stream_options; expected include_usage of a stream and nothing else", param="stream_options"
            )
        include_usage = _Fields(options).take_flag("include_usage")
    constraint = _read_format(fields.take("response_format"), "response_format", inner="json_schema")
    request = _read_sampling(fields, messages, scope=scope)
    request = replace(
        request,
        max_new_tokens=tokens or older or limits.default_new_tokens,
        stop=tuple(stop),
        logprobs=(top or 0) if wants_logprobs else None,
        constraint=constraint,
    )
    for name in ("presence_penalty", "frequency_penalty"):
        if fields.take_number(name, -2, 2):
            raise RequestError(f"got {name}; this server has none; expected 0", param=name)
    fields.refuse_unless(tools=[[]], tool_choice=["none", "auto"], functions=[[]], logit_bias=[{}], store=[False])
    fields.refuse_unless(modalities=[["text"]], parallel_tool_calls=[True, False], service_tier=["auto", "default"])
    fields.finish()
    seeds = [(request.seed + number) % MAX_SEED for number in range(num_choices)]
    return Call(model, [replace(request, seed=seed) for seed in seeds], stream, include_usage)


def read_responses(body: dict[str, Any], *, scope: bytes, limits: RequestLimits) -> Call:
    """What `/v1/responses` is asked; arguments and errors as those of `read_chat`."""
    fields = _Fields(body)
    model = fields.take_text("model", needed=True)
    given = fields.take("input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if isinstance(given, list):
        given = [_open_message_item(item, number) for number, item in enumerate(given)]
    instructions = fields.take_text("instructions")
    messages = _read_messages(given, "input", texts=RESPONSES_TEXTS, limits=limits)
    if instructions is not None:
        messages = [{"role": "system", "content": instructions}, *messages]
    tokens = fields.take_number("max_output_tokens", 1, limits.max_new_tokens, whole=True)
    stream = fields.take_flag("stream")
    text = fields.take("text")
    if text is not None and (not isinstance(text, dict) or text.keys() - {"format", "verbosity"}):
        raise RequestError("got another text; expected an object with format", param="text")
    constraint = _read_format((text or {}).get("format"), "text.format", inner=None)
    request = replace(
        _read_sampling(fields, messages, scope=scope),
        max_new_tokens=tokens or limits.default_new_tokens,
        constraint=constraint,
    )
    fields.refuse_unless(tools=[[]], tool_choice=["none", "auto"], store=[False], truncation=["disabled"])
    fields.refuse_unless(parallel_tool_calls=[True, False], include=[[]], background=[False])
    fields.finish()
    return Call(model, [request], stream, instructions=instructions)


class _Fields:
    """The fields of a request, each taken once; what is left at the end is unknown."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.left = dict(body)

    def take(self, name: str) -> Any:
        return self.left.pop(name, None)

    def take_text(self, name: str, *, needed: bool = False) -> str | None:
        value = self.take(name)
        if value is None and not needed:
            return None
        if not isinstance(value, str):
            raise RequestError(f"got {_describe(value)} as {name}; expected a text", param=name)
        return value

    def take_flag(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise RequestError(f"got {_describe(value)} as {name}; expected true or false", param=name)
        return bool(value)

    def take_number(self, name: str, least: float, most: float, *, whole: bool = False) -> Any:
        value = self.take(name)
        if value is None:
            return None
        is_number = isinstance(value, int if whole else Real) and not isinstance(value, bool)
        if not is_number or not least <= value <= most or not math.isfinite(value):
            kind = "a whole number" if whole else "a number"
            raise RequestError(f"got {_describe(value)} as {name}; expected {kind} from {least} to {most}", param=name)
        return value

    def refuse_unless(self, **fields: list[Any]) -> None:
        """Refuse fields of what this server does not do, except where they ask for nothing."""
        for name, values in fields.items():
            value = self.take(name)
            if value is not None and value not in values:
                raise RequestError(
                    f"got {name}, which this server does not have; leave it out", param=name, code="unsupported"
                )

    def finish(self) -> None:
        """Refuse what is left, except names that a client gives to its requests for itself."""
        for name in ("user", "metadata", "safety_identifier", "prompt_cache_key"):
            self.take(name)
        for name, value in self.left.items():
            if value is not None:
                raise RequestError(
                    f"got the field {name[:60]!r}, which this server does not know; leave it out",
                    param=name[:60],
                    code="unknown_parameter",
                )


def _read_sampling(fields: _Fields, messages: list[dict[str, Any]], *, scope: bytes) -> AnswerRequest:
    temperature = fields.take_number("temperature", 0, 2)
    top_p = fields.take_number("top_p", 0, 1)
    seed = fields.take_number("seed", -MAX_SEED, MAX_SEED, whole=True)
    if top_p == 0:
        raise RequestError("got top_p=0, which leaves no token; expected more", param="top_p")
    return AnswerRequest(
        messages,
        temperature=float(temperature or 0),
        top_p=1.0 if top_p is None else float(top_p),
        seed=secrets.randbelow(2**31) if seed is None else seed % MAX_SEED,
        scope=scope,
    )


def _read_messages(value: Any, name: str, *, texts: tuple[str, ...], limits: RequestLimits) -> list[dict[str, Any]]:
    """Messages as the processor takes them.

    Raises:
        RequestError: naming the message, or the limit.
    """
    if not isinstance(value, list) or not value:
        raise RequestError(f"got {_describe(value)} as {name}; expected a list of messages", param=name)
    if len(value) > limits.max_messages:
        raise RequestError(
            f"got {len(value)} messages; expected at most {limits.max_messages}; send fewer", param=name
        )
    messages, num_characters, num_pictures = [], 0, 0
    for number, message in enumerate(value):
        place = f"{name}[{number}]"
        # A list has no hash.
        if not isinstance(message, dict) or message.get("role") not in tuple(ROLES):
            raise RequestError(
                f"got {_describe(message)} as {place}; expected a message with one of the roles {', '.join(ROLES)}",
                param=place,
            )
        for field, content in message.items():
            if field not in ("role", "content") and content not in (None, [], ""):
                raise RequestError(
                    f"got the field {field[:60]!r} in {place}, which this server does not have; leave it out",
                    param=place,
                )
        content = _read_content(message.get("content"), place, texts=texts)
        pictures = [item for item in content if item["type"] == "image"]
        if pictures and message["role"] != "user":
            raise RequestError(
                f"got a picture from the {message['role']} in {place}; expected them from the user", param=place
            )
        num_pictures += len(pictures)
        num_characters += sum(len(item.get("text", "")) for item in content)
        messages.append({"role": ROLES[message["role"]], "content": content})
    for count, most, what in (
        (num_characters, limits.max_characters, "characters"),
        (num_pictures, limits.max_pictures, "pictures"),
    ):
        if count > most:
            raise RequestError(f"got {count} {what}; expected at most {most}; send fewer", param=name)
    return messages


def _read_content(content: Any, place: str, *, texts: tuple[str, ...]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise RequestError(
            f"got {_describe(content)} as the content of {place}; expected a text or a list of parts", param=place
        )
    items = []
    for item in content:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind in texts and isinstance(item.get("text"), str):
            items.append({"type": "text", "text": item["text"]})
            continue
        picture = item.get("image_url") if kind in ("image_url", "input_image") else None
        if isinstance(picture, dict):
            picture = picture.get("url")
        if not isinstance(picture, str) or not picture:
            raise RequestError(
                f"got {_describe(kind if kind is not None else item)} as a part of {place}; expected text, or a "
                "picture with its URL or data URI",
                param=place,
            )
        items.append({"type": "image", "image": picture})
    return items


def _open_message_item(item: Any, number: int) -> Any:
    """A message of `/v1/responses` as one of a chat; other items are for what this server does not do."""
    if not isinstance(item, dict) or item.get("type", "message") != "message":
        raise RequestError(f"got {_describe(item)} as input[{number}]; expected a message", param=f"input[{number}]")
    return {name: value for name, value in item.items() if name in ("role", "content")}


def _read_format(value: Any, name: str, *, inner: str | None) -> Constraint | None:
    """A `response_format`, whose schema is in a field of its own for chats.

    Raises:
        RequestError: if it is none, or its schema cannot be followed.
    """
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    readers: dict[str, Callable[[], Constraint | None]] = {
        "text": lambda: None,
        "json_object": Constraint.follow_schema,
        "json_schema": lambda: Constraint.follow_schema(_find_schema(value, name, inner=inner)),
    }
    if kind not in tuple(readers):
        raise RequestError(
            f"got {_describe(kind)} as the type of {name}; expected one of {', '.join(readers)}", param=name
        )
    try:
        return readers[kind]()
    except ValueError as error:
        raise RequestError(str(error), param=name) from None


def _find_schema(value: dict[str, Any], name: str, *, inner: str | None) -> Any:
    holder = value if inner is None else value.get(inner)
    if not isinstance(holder, dict) or "schema" not in holder:
        raise RequestError(f"got {name} without a schema; expected one", param=name)
    return holder["schema"]


def _describe(value: Any) -> str:
    """A value of a stranger in a few words."""
    if value is None:
        return "nothing"
    if isinstance(value, (bool, int, float)):
        return str(value)[:40]
    if isinstance(value, str):
        return repr(value[:40])
    return "an object" if isinstance(value, dict) else f"a list of {len(value)}" if isinstance(value, list) else "that"


def _refuse_constant(name: str) -> None:
    raise ValueError(name)
