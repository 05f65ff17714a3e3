"""Records of JSON files, read one at a time.

JSON is read here and not by `datasets`, which wants one type for each key: LLaVA's own files mix numbers and texts in
`id`, and one and many in `image`. LLaVA's instruction data is one list of a gigabyte, which `json.load` turns into
several times as much, so a part of the file is in memory at a time. ijson 3.6 would read lists so, too; but it turns
half a surrogate pair into "?", has no NaN and no large integer, and takes all memory for brackets in brackets.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from .data_bounds import MOST_RECORD_CHARACTERS, RefusedRecord

RECORD_KEYS = frozenset({"conversations", "messages", "prompt"})
"""One of them is in every record; see `conversations.py`."""

BLOCK_CHARACTERS = 2**20
_SPACE = re.compile(r"[ \t\r\n]*")


def stream_records(path: str | Path, *, keys: frozenset[str] = RECORD_KEYS) -> Iterator[Any]:
    """The records of a file, as they are.

    Args:
        path: `.json` (a list of records, or one alone) or JSON Lines, in UTF-8.
        keys: One of them is in a record that is a file alone, whose object might be anything else; empty for any.

    Yields:
        Whatever JSON holds; for a line that is not JSON, the `RefusedRecord` that says so.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text in UTF-8, a list that breaks off, or one object that holds no key.
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
            alone = _read_single_object(file, path)
            if alone is not None:
                _check_record_keys(alone, path, keys)
                yield alone
                return
            file.seek(0)
            yield from _parse_lines(file, path)
        except UnicodeDecodeError as error:
            raise ValueError(f"got {path}, which is not UTF-8 ({error}); expected text; save it as UTF-8") from error


def _read_single_object(file: TextIO, path: Path) -> dict[str, Any] | None:
    """The object that a whole file is, in one line or in many; None for another file."""
    lines = _read_lines(file)
    first = next((line for line in lines if line.strip()), "")
    if not first.lstrip().startswith("{"):
        return None
    try:
        single = json.loads(first)
        return single if not any(line.strip() for line in lines) else None
    except json.JSONDecodeError as error:
        # Only an object that goes on in the next line is worth to be read as a whole.
        if error.pos < len(first.rstrip()):
            return None
    except (ValueError, RecursionError):
        return None
    try:
        rest = file.read(MOST_RECORD_CHARACTERS)
        if len(rest) == MOST_RECORD_CHARACTERS:
            # Another record comes next, or this object is longer than one may be.
            json.loads(rest.split("\n", 1)[0])
            return None
        return json.loads(first + rest)
    except (ValueError, RecursionError) as error:
        if len(rest) == MOST_RECORD_CHARACTERS:
            raise ValueError(
                f"got {path}, which is one JSON object of more than {MOST_RECORD_CHARACTERS:,} characters; expected a "
                "list of records, or a record in each line"
            ) from error
        return None


def _check_record_keys(single: dict[str, Any], path: Path, keys: frozenset[str]) -> None:
    if keys and not keys & single.keys():
        found = ", ".join(repr(key[:40]) for key in sorted(single)[:10])
        raise ValueError(
            f"got {path}, which is one JSON object with the keys {found}; expected a list of records, or a record in "
            f"each line, with {', '.join(sorted(keys))}: write its rows as such, as README.md does with those "
            "of a CSV file"
        )


def _parse_lines(file: TextIO, path: Path) -> Iterator[Any]:
    for number, line in enumerate(_read_lines(file), start=1):
        if not line.strip():
            continue
        # ValueError also for an integer of too many digits, RecursionError for brackets in brackets.
        try:
            if len(line) > MOST_RECORD_CHARACTERS:
                raise ValueError(f"more than {MOST_RECORD_CHARACTERS:,} characters")
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            record = RefusedRecord(
                f"{path.name}, line {number}",
                "not JSON",
                f"{line.strip()[:40]!r} ({error})",
                "expected a JSON list, or one record in each line; correct the line",
            )
        yield record


def _read_lines(file: TextIO) -> Iterator[str]:
    """The lines of a file; of one that is longer than a record may be, the beginning."""
    while line := file.readline(MOST_RECORD_CHARACTERS + 1):
        rest = line
        while len(rest) > MOST_RECORD_CHARACTERS and not rest.endswith("\n"):
            rest = file.readline(MOST_RECORD_CHARACTERS + 1)
        yield line


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
        # What comes next tells a whole number from the first half of one.
        if text.startswith((",", "]"), end):
            yield record
            num_records += 1
            position, is_closed = end + 1, text[end] == "]"
            continue
        text, position = text[position:], 0
        # As much again as there is, so that a list that breaks early is not copied a thousand times.
        block = file.read(min(max(BLOCK_CHARACTERS, len(text)), MOST_RECORD_CHARACTERS + 1 - len(text)))
        if not block:
            raise ValueError(
                f"got {path}, whose list is no JSON after {num_records} records, at {text[:60]!r}; expected records "
                f"of at most {MOST_RECORD_CHARACTERS:,} characters between commas and a closing bracket; correct the "
                "file"
            )
        text += block
