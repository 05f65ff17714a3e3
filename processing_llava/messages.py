"""The form of messages, which come from strangers: checked before anything reads them, with the pictures in them.

What is surprising: content may be missing beside `tool_calls`, as other software writes it; types of items that are
neither text nor image are left to the chat template. A list of one picture is that picture, wherever one is expected.
"""

import base64
import dataclasses
import io
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import numpy as np

PICTURE_KEYS = ("image", "path", "url")
"""Keys of an image item that can hold its picture, beside "base64" (transformers 5.23, processing_utils.py)."""

IMAGE_TYPES = ("image", "image_url")

MAX_LINE = 1000
"""Characters of an error or a line of the log about files of strangers."""
MAX_DEPTH = 100
"""Messages are read by functions that call themselves, which Python does to a limited depth."""
_BASE64_PIECE = 1 << 16


def check_messages(messages: Any) -> None:
    """Refuses what is no conversation.

    Raises:
        ValueError: naming the message.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"got the conversation {shorten(messages)}; expected a list of messages; give at least one")
    for number, message in enumerate(messages):
        try:
            _check_message(message)
            _check_strings(message)
        except ValueError as error:
            raise ValueError(f"got message {number} with {error}; correct it") from None


def is_missing(value: Any) -> bool:
    """Whether this is a spelling of nothing, as JSON, pandas and `datasets` have them.

    They are None, NaN, a text of blanks, no bytes, and a list or dict of nothing else, such as
    `{"bytes": None, "path": None}`.
    """
    if isinstance(value, Real):
        return bool(value != value)
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, (list, tuple)):
        return all(map(is_missing, value))
    if isinstance(value, dict):
        return all(map(is_missing, value.values()))
    return value is None or (isinstance(value, (bytes, bytearray)) and not value)


def list_pictures(messages: list[dict[str, Any]]) -> Iterator[Any]:
    """The pictures of a conversation that was checked, in reading order.

    Raises:
        ValueError: an image item without one.
    """
    for item in list_image_items(messages):
        picture = find_picture(item)
        if picture is None:
            raise ValueError('got an image item without a picture; expected {"type": "image", "image": ...}')
        yield picture


def list_image_items(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The items of a conversation that was checked which stand for images."""
    for message in messages:
        content = message.get("content")
        for item in content if isinstance(content, (list, tuple)) else ():
            if item["type"] in IMAGE_TYPES:
                yield item


def find_picture(item: dict[str, Any]) -> Any:
    """The picture that an image item holds, whatever it is; None for a place without one.

    Raises:
        ValueError: for several pictures in one item.
    """
    if item["type"] == "image_url":
        sources = [item["image_url"]["url"]]
    else:
        sources = [item.get(key) for key in PICTURE_KEYS]
        if item.get("base64"):
            # A data URI, too (transformers 5.23, image_utils.py).
            sources.append(Base64File(item["base64"], item["base64"].rfind(",") + 1))
    return unwrap_list(next((source for source in sources if not is_missing(source)), None))


class Base64File:
    """A binary file of what a text spells in base64, without a copy of the text.

    Args:
        text: With line breaks and blanks, if it has some.
        start: Where the base64 begins.
    """

    def __init__(self, text: str, start: int = 0) -> None:
        self.text, self.start = text, start

    def __len__(self) -> int:
        return len(self.text)

    def read(self, size: int) -> bytes:
        file, waiting = io.BytesIO(), b""
        for start in range(self.start, len(self.text), _BASE64_PIECE):
            waiting += self.text[start : start + _BASE64_PIECE].encode("ascii").translate(None, b" \t\r\n")
            # The last four, which alone may be filled up, wait.
            num_whole = max(0, len(waiting) - 4) // 4 * 4
            if b"=" in waiting[:num_whole]:
                raise ValueError("more text behind its end")
            file.write(base64.b64decode(waiting[:num_whole], validate=True))
            waiting = waiting[num_whole:]
            if file.tell() >= size:
                file.truncate(size)
                return file.getvalue()
        file.write(base64.b64decode(waiting, validate=True))
        return file.getvalue()


def unwrap_list(picture: Any) -> Any:
    """The picture of a list of one; every other picture as it is.

    Raises:
        ValueError: for a list of several, of which a row could get the picture of another.
    """
    if not isinstance(picture, (list, tuple)):
        return picture
    pictures = [item for item in picture if not is_missing(item)]
    if len(pictures) != 1:
        raise ValueError(f"got {len(pictures)} pictures in one place; expected one: make a place for each")
    return unwrap_list(pictures[0])


def unwrap_picture(picture: Any) -> Any:
    """What the `{"bytes": ..., "path": ...}` of `datasets` holds; every other picture as it is."""
    if not isinstance(picture, dict):
        return picture
    return next((picture[key] for key in ("bytes", "path") if not is_missing(picture.get(key))), None)


def open_value(value: Any) -> Any:
    """What chat templates see of a value: types of JSON, as transformers makes them out of what callers give.

    Objects become dicts of their fields, and what is neither becomes the name of its type (transformers 5.23,
    utils/chat_template_utils.py). Here it is done before texts are marked, so that those in objects are, too.

    Returns:
        Strings, numbers, booleans, None, lists and dicts as they are; their entries are not opened.
    """
    if value is None or isinstance(value, (str, bool, int, float, dict, list)):
        return value
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.generic):
        # A scalar without a type of Python, such as np.longdouble, gives itself.
        item = value.item()
        return str(item) if isinstance(item, np.generic) else open_value(item)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return open_value(value.model_dump())
    return f"<{type(value).__name__}>"


def _check_message(message: Any) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f'{shorten(message)}; expected {{"role": ..., "content": ...}}')
    content = message.get("content")
    if content is None and message["role"] != "user" and message.get("tool_calls"):
        return
    if not isinstance(content, (str, list, tuple)):
        raise ValueError(f"the content {shorten(content)}; expected a text or a list of items")
    for item in () if isinstance(content, str) else content:
        check_item(item)


def check_item(item: Any) -> None:
    """Refuses what is no item of a content.

    Raises:
        ValueError: whose text begins with what is wrong, for messages that say where it is.
    """
    kind = item.get("type") if isinstance(item, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f'the item {shorten(item)}; expected {{"type": "text", "text": ...}} or {{"type": "image"}}')
    if kind == "text" and not isinstance(item.get("text"), str):
        raise ValueError(f"the text {shorten(item.get('text'))}; expected a string")
    # Columnar data sets fill every item with the keys of all others: what is missing says nothing.
    foreign = {"text": (*PICTURE_KEYS, "base64", "image_url"), "image": ("text",), "image_url": ("text",)}
    for key in foreign.get(kind, ()):
        if not is_missing(item.get(key)):
            raise ValueError(
                f"an item of type {kind!r} with {key!r}, which would be lost; expected an item for each text and each "
                "picture"
            )
    if kind == "image" and not isinstance(item.get("base64"), (str, type(None))):
        raise ValueError(f"the base64 {shorten(item['base64'])}; expected a string")
    if kind == "image_url" and not (isinstance(item.get("image_url"), dict) and "url" in item["image_url"]):
        raise ValueError(f'the image_url {shorten(item.get("image_url"))}; expected {{"url": ...}}')


def _check_strings(value: Any, *, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"lists and objects {depth} deep in each other; expected at most {MAX_DEPTH}")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            # JSON can spell half of a surrogate pair, which no tokenizer takes.
            raise ValueError(f"text that is not Unicode ({error.reason}); expected whole characters") from None
        return
    value = open_value(value)
    if isinstance(value, dict):
        for key, item in value.items():
            _check_strings(key, depth=depth + 1)
            _check_strings(item, depth=depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_strings(item, depth=depth + 1)


def shorten(value: Any) -> str:
    """At most 80 characters of a value, for a message about it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def write_line(message: Any, most: int = MAX_LINE) -> str:
    """A message, or an exception's, as one line of printable characters and bounded length, without its middle."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in str(message)).split())
    return line if len(line) <= most else f"{line[: most * 2 // 3]} ... {line[-most // 3 + 5 :]}"
