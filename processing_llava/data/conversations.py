"""Records of the LLaVA family -> rows `{"id": str, "images": [...], "messages": [...]}`.

Read are the JSON of the original LLaVA, `messages` (or `prompt` and `completion`) as transformers and TRL write them,
and ShareGPT. LLaVA:
`{"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": [
{"from": "human", "value": "<image>\\nWhat is shown?"}, {"from": "gpt", "value": "A bus."}]}`

Turns with images are normalised as the original LLaVA trains on them: a single `<image>` goes to the front of its
turn, and the white space around the turn goes. What is surprising:
- Several `<image>` in one turn stay where they are, as in LLaVA-NeXT; the original makes one of them.
- A first turn of the assistant is dropped, as both do: ShareGPT holds conversations cut in the middle.
- `system` beside the turns, as ShareGPT has it, becomes the system message.
- `<image>` is a placeholder in what the user says. Elsewhere it is text.
- Pictures for which there is no place go to the front of what the user says first, as in TRL.
- Items of a turn stay in their order: a question before its picture is asked in that order by every chat template.
- `prompt` and `completion` of TRL are one conversation, if they are lists of messages.
- Content is a list of items even where it is one text: columnar data sets cannot mix texts and lists.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from processing_llava.image_loading import read_file_object
from processing_llava.messages import (
    IMAGE_TYPES,
    check_item,
    find_picture,
    is_missing,
    shorten,
    unwrap_list,
    unwrap_picture,
)

from .data_bounds import RefusedRecord
from .data_sources import ImageFolder

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Role names of data files to those of messages."""

IMAGE = "<image>"
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
ADDRESS = re.compile(r"data:|[A-Za-z][A-Za-z0-9+.-]*://", flags=re.IGNORECASE)
"""How a text begins that is no path."""


def convert_record(record: Any, index: int, *, image_folder: ImageFolder | str | Path | None = None) -> dict[str, Any]:
    """One record -> one row.

    Args:
        record: A dict with `conversations`, `messages`, or `prompt` and `completion`, and perhaps `system`. `image` or
            `images` may be missing, one, or a list, each a path, data URI, bytes, PIL image, array, or the
            `{"bytes", "path"}` of `datasets`; items of `messages` can hold theirs instead, as `list_pictures` finds
            them. A `RefusedRecord` is raised.
        index: Position in the data; the id of a record that has none.
        image_folder: Where image paths start and have to stay. Without it only bytes, PIL images and `pathlib.Path`
            objects are images: a text could name any file of the machine.

    Returns:
        `id`, `images` in reading order, and `messages`: an optional system message, then user and assistant in turn.
        `content` is a list of `{"type": "image"}` and `{"type": "text", "text": ...}`. Paths are `pathlib.Path`.

    Raises:
        RefusedRecord: for a missing key, two keys for one thing, a value of the wrong kind, video or audio, an unknown
            role, wrong order, an empty answer, one that calls tools, stands in a prompt or is not to be learned,
            another number of `<image>` than of images, unless there is none, two system messages, a URL, or a path
            that leads out of the image folder.
    """
    if isinstance(record, RefusedRecord):
        raise record
    if not isinstance(record, dict):
        raise RefusedRecord(str(index), "not a record", shorten(record), "expected a JSON object; correct the file")
    row_id = str(index) if is_missing(record.get("id")) else str(record["id"])
    with _naming(row_id):
        return {"id": row_id, **_convert(record, image_folder)}


def _convert(record: dict[str, Any], image_folder: ImageFolder | str | Path | None) -> dict[str, Any]:
    for key in _OTHER_MEDIA:
        if not is_missing(record.get(key)):
            raise _Fault(
                "video or audio",
                f"{key!r}: {shorten(record[key])}",
                "expected images and text; take the record out",
            )
    messages = [_convert_turn(turn) for turn in _read_turns(record)]
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    if not is_missing(record.get("system")):
        system = _add_system(record["system"], system)
    if turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
    _check_turns(turns)
    image_items = [item for turn in turns for item in turn["content"] if item["type"] == "image"]
    own = [item.pop("image") for item in image_items if "image" in item]
    images = _list_images(record)
    if own and images:
        raise _Fault(
            "two keys for one thing",
            f"{len(own)} images in the messages and {len(images)} beside them",
            "expected one place for all of them; take the others out",
        )
    images = own or images
    if images and not image_items:
        turns = place_images(turns, len(images))
    elif len(image_items) != len(images):
        raise _Fault(
            "images and placeholders differ",
            f"{len(image_items)} {IMAGE} and {len(images)} images",
            "expected equal numbers; correct the record or take it out",
        )
    images = [_read_image(image, image_folder) for image in images]
    return {"images": images, "messages": system + turns}


class _Fault(ValueError):
    """What is wrong with a record: the reason, what was got, and the remedy of a `RefusedRecord`."""


@contextmanager
def _naming(row_id: str) -> Iterator[None]:
    try:
        yield
    except _Fault as fault:
        raise RefusedRecord(row_id, *fault.args) from fault.__cause__


def drops_first_turn(record: dict[str, Any]) -> bool:
    """Whether `convert_record`, which took this record, leaves out a first turn of the assistant."""
    roles = [ROLES[turn["role"] if "role" in turn else turn["from"]] for turn in _read_turns(record)]
    return roles[1 if roles[0] == "system" else 0] == "assistant"


def place_images(messages: list[dict[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """Messages without a place for an image, with places for all of them in front of what the user says first."""
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is None:
        return messages
    content = first["content"]
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    placed = {**first, "content": [*({"type": "image"} for _ in range(num_images)), *content]}
    return [placed if message is first else message for message in messages]


def _add_system(text: Any, system: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if system:
        raise _Fault(
            "two system messages",
            f"a system message beside the turns ({shorten(text)}) and one among them",
            "expected one; take the other out",
        )
    return [_convert_turn({"role": "system", "content": text})]


def _read_turns(record: dict[str, Any]) -> list[Any]:
    turns = _find_value(record, ("messages", "conversations"))
    if turns is None:
        turns = _join_completion(record)
    elif isinstance(record.get("completion"), list) and not is_missing(record["completion"]):
        raise _Fault(
            "two keys for one thing", "'completion' beside a conversation", "expected one of them; take the other out"
        )
    if turns is None:
        raise _Fault(
            "no conversation",
            f"keys {sorted(map(str, record))}",
            "expected 'conversations' or 'messages', or 'prompt' and 'completion' with lists of messages; convert the "
            "file",
        )
    return _list_turns(turns)


def read_messages(record: dict[str, Any], row_id: str) -> list[dict[str, Any]] | None:
    """`messages` of a row, or those of `prompt` and `completion`; None if it has neither.

    Raises:
        RefusedRecord: naming the row, if its prompt has answers.
    """
    with _naming(row_id):
        messages = record.get("messages")
        return _join_completion(record) if messages is None else messages


def _join_completion(record: dict[str, Any]) -> list[Any] | None:
    parts = [record.get("prompt"), record.get("completion")]
    if not all(isinstance(part, (list, dict)) for part in parts):
        return None
    prompt, completion = map(_list_turns, parts)
    if any(isinstance(turn, dict) and turn.get("role") == "assistant" for turn in prompt):
        # Every answer of a row is learned, and TRL learns the completion alone.
        raise _Fault(
            "answers in a prompt",
            "an answer in 'prompt'",
            "expected answers in 'completion', which is learned; put all turns into 'messages' to learn all answers",
        )
    return [*prompt, *completion]


def _list_turns(turns: Any) -> list[Any]:
    if isinstance(turns, dict) and all(isinstance(column, list) for column in turns.values()):
        # A `Sequence` of dicts becomes a dict of lists (datasets 5.2, features/features.py).
        turns = [dict(zip(turns, values)) for values in zip(*turns.values())]
    if not isinstance(turns, list):
        raise _Fault("malformed turn", shorten(turns), "expected a list of turns; correct the record")
    return turns


def _convert_turn(turn: Any) -> dict[str, Any]:
    role_key, content_key = ("role", "content") if isinstance(turn, dict) and "role" in turn else ("from", "value")
    role, content = (turn.get(role_key), turn.get(content_key)) if isinstance(turn, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, (str, list)):
        raise _Fault(
            "malformed turn",
            f"turn {shorten(turn)}",
            f"expected a text in {content_key!r} and its author in {role_key!r}; correct the record",
        )
    if role not in ROLES:
        raise _Fault("unknown role", f"role {role!r}", f"expected one of {', '.join(ROLES)}; correct the record")
    if ROLES[role] == "assistant":
        _check_answer(turn)
    if isinstance(content, list):
        items = [_convert_item(item) for item in content]
    elif ROLES[role] == "user" and IMAGE in content:
        items = split_at_images(content)
    else:
        items = [{"type": "text", "text": content}]
    _check_unicode(items)
    return {"role": ROLES[role], "content": items}


def _check_answer(turn: dict[str, Any]) -> None:
    if turn.get("tool_calls"):
        raise _Fault("tool calls", f"tool calls {shorten(turn['tool_calls'])}", "expected text; take the record out")
    if turn.get("weight") not in (None, 1):
        # Every answer of a row is learned: only the template tells what is.
        raise _Fault(
            "weight of an answer",
            f"an answer of weight {turn['weight']!r}",
            "expected 1, which is learned; take the answer and what follows it out, or the record",
        )


def _convert_item(item: Any) -> dict[str, Any]:
    """Columnar data sets fill every item with the keys of all others: only what its type needs is kept."""
    try:
        check_item(item)
        kind = item["type"]
        image = find_picture(item) if kind in IMAGE_TYPES else None
    except ValueError as error:
        raise _Fault("malformed content", str(error).removeprefix("got "), "correct the record") from error
    if kind == "text":
        return {"type": "text", "text": item["text"]}
    if kind in IMAGE_TYPES:
        return {"type": "image"} if image is None else {"type": "image", "image": image}
    raise _Fault(
        "malformed content",
        f"item {shorten(item)}",
        'expected {"type": "text", "text": ...} or {"type": "image"}; correct the record',
    )


def split_at_images(text: str) -> list[dict[str, str]]:
    """Content items of a turn with images. White space beside leading images is the template's to write."""
    pieces = text.strip().split(IMAGE)
    if len(pieces) == 2:
        pieces = ["", "".join(pieces).strip()]
    items: list[dict[str, str]] = []
    has_text = False
    for position, piece in enumerate(pieces):
        if position:
            items.append({"type": "image"})
        if not has_text:
            piece = piece.lstrip()
        if piece:
            has_text = True
            items.append({"type": "text", "text": piece})
    return items


def _check_unicode(items: list[dict[str, Any]]) -> None:
    for item in items:
        try:
            item.get("text", "").encode()
        except UnicodeEncodeError as error:
            # JSON can spell half of a surrogate pair, which no tokenizer takes.
            raise _Fault(
                "text that is not Unicode", str(error), "expected whole characters; correct the record"
            ) from error


def _check_turns(turns: list[dict[str, Any]]) -> None:
    if not turns:
        raise _Fault("no turns", "no turns", "expected at least one of the user; take the record out")
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if turn["role"] != expected:
            raise _Fault(
                "wrong order of turns",
                f"a turn of the {turn['role']} at position {number}",
                f"expected the {expected}: user and assistant in turn, a system message only at the start; correct "
                "the record",
            )
        answer = "".join(item["text"] for item in turn["content"] if item["type"] == "text")
        if turn["role"] == "assistant" and not answer.strip():
            raise _Fault(
                "empty answer",
                f"an empty answer at position {number}",
                "expected text to learn; take the record out",
            )


def _find_value(record: dict[str, Any], keys: tuple[str, str]) -> Any:
    """What one of two keys holds; the other must be missing or empty."""
    given = [key for key in keys if record.get(key) is not None]
    filled = [key for key in given if not is_missing(record[key])]
    if len(filled) > 1:
        raise _Fault("two keys for one thing", f"{' and '.join(map(repr, keys))}", "expected one; take the other out")
    return record[(filled or given)[0]] if given else None


def read_images(record: dict[str, Any], row_id: str) -> list[Any]:
    """What a record holds in `image` or `images`.

    Raises:
        RefusedRecord: naming the row, if it has both.
    """
    with _naming(row_id):
        return _list_images(record)


def _list_images(record: dict[str, Any]) -> list[Any]:
    # pandas makes arrays of lists.
    given = {
        key: value.tolist() if isinstance(value, np.ndarray) and value.dtype == object else value
        for key, value in record.items()
        if key in ("images", "image")
    }
    images = _find_value(given, ("images", "image"))
    images = images if isinstance(images, (list, tuple)) else [images]
    try:
        return [unwrap_list(image) for image in images if not is_missing(image)]
    except ValueError as error:
        raise _Fault("malformed image", str(error).removeprefix("got "), "correct the record") from error


def _read_image(
    image: Any, folder: ImageFolder | str | Path | None
) -> str | bytes | Path | Image.Image | np.ndarray | torch.Tensor:
    image = unwrap_picture(image)
    if isinstance(image, (bytearray, memoryview)):
        image = bytes(image)
    if isinstance(image, str) and image[:5].lower() != "data:":
        if ADDRESS.match(image):
            # Whoever opens it later, such as `datasets`, may read any file of the machine, or a host of its network.
            raise _Fault(
                "image address",
                f"the image address {shorten(image)}",
                "expected a path or bytes; download it",
            )
        if folder is None:
            raise _Fault("image path without a folder", f"the image path {shorten(image)}", "set image_folder")
        try:
            return (folder if isinstance(folder, ImageFolder) else ImageFolder(folder)).find(image)
        except ValueError as error:
            raise _Fault("image outside its folder", f"an image elsewhere ({error})", "correct the record") from error
    if isinstance(image, os.PathLike):
        return Path(os.fsdecode(image))
    if isinstance(image, (str, bytes, Image.Image, np.ndarray, torch.Tensor)):
        return image
    try:
        return read_file_object(image)
    except ValueError as error:
        raise _Fault(
            "malformed image", f"image {shorten(image)}", "expected a path or bytes; correct the record"
        ) from error
