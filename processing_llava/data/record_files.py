"""Records of a JSON list or of JSON Lines one by one, with a part of the file in memory.

LLaVA's instruction data is one list of a gigabyte, which `json.load` turns into several times as much.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

BLOCK_CHARACTERS = 2**20

RECORD_KEYS = frozenset({"conversations", "messages", "prompt"})
"""One of them is in every record; see `conversations.py`."""

_SPACE = re.compile(r"[ \t\r\n]*")


class RefusedRecord(ValueError):
    """A record that cannot be trained on.

    Args:
        record_id: What names it in the data.
        reason: The kind of fault, in words that are the same for every such record.
        got: What is wrong with this one.
        remedy: What was expected, and what to do.
    """

    def __init__(self, record_id: str, reason: str, got: str, remedy: str) -> None:
        super().__init__(record_id, reason, got, remedy)
        self.record_id = record_id
        self.reason = reason

    def __str__(self) -> str:
        record_id, _, got, remedy = self.args
        return f"got {got} in record {record_id!r}; {remedy}"


def stream_records(path: str | Path) -> Iterator[Any]:
    """The records of a file, as they are.

    Args:
        path: `.json` (a list of records, or one alone) or JSON Lines, in UTF-8.

    Yields:
        Whatever JSON holds; for a line that is not JSON, the `RefusedRecord` that says so.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text in UTF-8, a list that breaks off, or one object that holds no conversation.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"got the path {str(path)!r}; expected a file with a JSON list or JSON Lines; correct it"
        )
    with path.open(encoding="utf-8-sig") as file:
        try:
            is_list = file.read(BLOCK_CHARACTERS).lstrip().startswith("[")
            file.seek(0)
            if is_list:
                yield from _parse_list(file, path)
                return
            alone = _read_single_object(file)
            if alone is not None:
                _check_record_keys(alone, path)
                yield alone
                return
            file.seek(0)
            yield from _parse_lines(file, path)
        except UnicodeDecodeError as error:
            raise ValueError(f"got {path}, which is not UTF-8 ({error}); expected text; save it as UTF-8") from error


def _read_single_object(file: TextIO) -> dict[str, Any] | None:
    """The object that a whole file is, in one line or in many; None of another file."""
    first = next((line for line in file if line.strip()), "")
    if not first.lstrip().startswith("{"):
        return None
    try:
        single = json.loads(first)
        return single if not any(line.strip() for line in file) else None
    except json.JSONDecodeError as error:
        # Only an object that goes on in the next line is worth to be read as a whole.
        if error.pos < len(first.rstrip()):
            return None
    except (ValueError, RecursionError):
        return None
    try:
        return json.loads(first + file.read())
    except (ValueError, RecursionError):
        return None


def _check_record_keys(single: dict[str, Any], path: Path) -> None:
    if not RECORD_KEYS & single.keys():
        keys = ", ".join(repr(key[:40]) for key in sorted(single)[:10])
        raise ValueError(
            f"got {path}, which is one JSON object with the keys {keys}; expected a list of records, or a record in "
            f"each line, with {', '.join(sorted(RECORD_KEYS))}: write its rows as such, as README.md does with those "
            "of a CSV file"
        )


def _parse_lines(file: TextIO, path: Path) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        # ValueError also for an integer of too many digits, RecursionError for brackets in brackets
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            record = RefusedRecord(
                f"{path.name}, line {number}",
                "not JSON",
                f"{line.strip()[:40]!r} ({error})",
                "expected a JSON list, or one record in each line; correct the line",
            )
        yield record


def _parse_list(file: TextIO, path: Path) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    text = file.read(BLOCK_CHARACTERS)
    position = text.index("[") + 1
    num_records, is_closed = 0, False
    while not is_closed:
        position = _SPACE.match(text, position).end()
        if num_records == 0 and text.startswith("]", position):
            return
        try:
            record, end = decoder.raw_decode(text, position)
            end = _SPACE.match(text, end).end()
        except (ValueError, RecursionError):
            end = len(text)
        # what comes next tells a whole number from the first half of one
        if text.startswith((",", "]"), end):
            yield record
            num_records += 1
            position, is_closed = end + 1, text[end] == "]"
            continue
        text, position = text[position:], 0
        # as much again as there is: a list that breaks early is not copied a thousand times
        block = file.read(max(BLOCK_CHARACTERS, len(text)))
        if not block:
            raise ValueError(
                f"got {path}, whose list is no JSON after {num_records} records, at {text[:60]!r}; expected records "
                "between commas and a closing bracket; correct the file"
            )
        text += block
