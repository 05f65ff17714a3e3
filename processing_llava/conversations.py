"""Data files of the LLaVA family -> rows `{"id": str, "images": [path], "messages": [...]}`.

Read are the JSON of the original LLaVA, rows that already hold `messages`, and ShareGPT without images; a file holds
one list, or one record a line. LLaVA:
`{"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": [
{"from": "human", "value": "<image>\\nWhat is shown?"}, {"from": "gpt", "value": "A bus."}]}`

Turns with images are normalised as the original LLaVA trains on them: a single `<image>` goes to the front of its
turn, and the white space around the turn goes. What is surprising:
- Several `<image>` in one turn stay where they are, as in LLaVA-NeXT; the original makes one of them.
- A first turn of the assistant is dropped, as both do: ShareGPT holds conversations cut in the middle.
- `<image>` is a placeholder in what the user says. Elsewhere it is text.
- Content is a list of items even where it is one text: columnar data sets cannot mix texts and lists.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Role names of data files to those of messages."""

_IMAGE = "<image>"


def read_conversations(path: str | Path, image_folder: str | Path | None = None) -> list[dict[str, Any]]:
    """All rows of a data file.

    Args:
        path: `.json` (a list of records) or JSON Lines.
        image_folder: Put in front of the image paths.

    Raises:
        ValueError: naming the file and line, or the record, that cannot be used; see `convert_record`.
    """
    return list(stream_conversations(path, image_folder))


def stream_conversations(path: str | Path, image_folder: str | Path | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a data file one by one; of JSON Lines, one line at a time is in memory."""
    for index, record in enumerate(_read_records(Path(path))):
        yield convert_record(record, index, image_folder=image_folder)


def convert_record(record: dict[str, Any], index: int, *, image_folder: str | Path | None = None) -> dict[str, Any]:
    """One record -> one row.

    Args:
        record: With `conversations` or `messages`; `image` or `images` may be missing, a path, or a list of paths.
        index: Position in the file; the id of a record that has none.
        image_folder: Put in front of the image paths.

    Returns:
        `id`, `images` in reading order, and `messages`: an optional system message, then user and assistant in turn.
        `content` is a list of `{"type": "image"}` and `{"type": "text", "text": ...}`.

    Raises:
        ValueError: naming the record, for a missing key, an unknown role, wrong order, an empty answer, or another
            number of `<image>` than of images.
    """
    row_id = str(record["id"]) if record.get("id") is not None else str(index)
    images = _read_images(record)
    messages = [_convert_turn(turn, row_id) for turn in _read_turns(record, row_id)]
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    if turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
    _check_turns(turns, row_id)
    num_placeholders = sum(item["type"] == "image" for turn in turns for item in turn["content"])
    if num_placeholders != len(images):
        raise ValueError(
            f"got {num_placeholders} {_IMAGE} and {len(images)} images in record {row_id!r}; expected equal numbers; "
            "correct the record or take it out"
        )
    if image_folder is not None:
        images = [str(Path(image_folder) / image) for image in images]
    return {"id": row_id, "images": images, "messages": system + turns}


def _read_records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        is_list = file.read(4096).lstrip().startswith("[")
        file.seek(0)
        if is_list:
            yield from json.load(file)
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"got {path}, line {number}: {error}; expected a JSON list, or one record in each line"
                ) from error
            yield record


def _read_images(record: dict[str, Any]) -> list[str]:
    images = record.get("images", record.get("image"))
    if images is None:
        return []
    return [images] if isinstance(images, str) else list(images)


def _read_turns(record: dict[str, Any], row_id: str) -> list[dict[str, Any]]:
    """Turns as `{"role": name in the file, "content": text or items}`."""
    for list_key, role_key, content_key in (("messages", "role", "content"), ("conversations", "from", "value")):
        if list_key in record:
            turns = record[list_key]
            for turn in turns:
                if role_key not in turn or not isinstance(turn.get(content_key), (str, list)):
                    raise ValueError(
                        f"got turn {turn} in record {row_id!r}; expected a text in {content_key!r} and its author in "
                        f"{role_key!r}; correct the record"
                    )
            return [{"role": turn[role_key], "content": turn[content_key]} for turn in turns]
    raise ValueError(
        f"got record {row_id!r} with keys {sorted(record)}; expected 'conversations' or 'messages'; convert the file"
    )


def _convert_turn(turn: dict[str, Any], row_id: str) -> dict[str, Any]:
    if turn["role"] not in ROLES:
        raise ValueError(
            f"got role {turn['role']!r} in record {row_id!r}; expected one of {', '.join(ROLES)}; correct the record"
        )
    role, content = ROLES[turn["role"]], turn["content"]
    if isinstance(content, str):
        has_images = role == "user" and _IMAGE in content
        content = _split_at_images(content) if has_images else [{"type": "text", "text": content}]
    return {"role": role, "content": content}


def _split_at_images(text: str) -> list[dict[str, str]]:
    """Content items of a turn with images. White space beside leading images is the template's to write."""
    pieces = text.strip().split(_IMAGE)
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


def _check_turns(turns: list[dict[str, Any]], row_id: str) -> None:
    if not turns:
        raise ValueError(f"got no turns in record {row_id!r}; expected at least one of the user; take the record out")
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if turn["role"] != expected:
            raise ValueError(
                f"got a turn of the {turn['role']} in record {row_id!r} at position {number}; expected the "
                f"{expected}: user and assistant in turn, a system message only at the start; correct the record"
            )
        answer = "".join(item["text"] for item in turn["content"] if item["type"] == "text")
        if turn["role"] == "assistant" and not answer.strip():
            raise ValueError(
                f"got an empty answer in record {row_id!r} at position {number}; expected text to learn; take the "
                "record out"
            )
