"""The file of answers: JSON Lines that only grow, so that whatever ends a run leaves every finished row.

One record a line: `key`, `number` (of the question about the picture, from 1), `image`, `question`, `answer` or
`error`, `task`, `model`, `finish_reason`, `settings`. There is no header, so that files of shards become one with
`cat`. A line is written by one call, and is whole once it ends in a line break: an end without one is cut off when the
run is resumed.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers.utils import logging

from modeling_llava.records.locks import hold_lock

from .tasks import Order

logger = logging.get_logger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_START = b'{"key": '
_FIELDS = ("key", "number", "question", "task", "model", "settings")


def digest_row(key: str, number: int) -> bytes:
    """What stands for a question about a picture, in little memory."""
    return hashlib.blake2b(json.dumps([key, number]).encode(), digest_size=12).digest()


def digest_question(question: Any) -> bytes:
    return hashlib.blake2b(json.dumps(question).encode(), digest_size=8).digest()


class AnswerFile:
    """A file of answers that this process alone writes.

    Args:
        path: The file, which is made with its first record, and its folder before.
        order: What its records have to be answers to.
        resume: Go on with the records that are there.

    Raises:
        ValueError: it is there without `resume`, another process writes to it, it holds something else, or answers to
            another order.
    """

    def __init__(self, path: str | Path, order: Order, *, resume: bool) -> None:
        self.path = Path(path)
        self.order = order
        self.done: dict[bytes, bytes] = {}
        """The rows that have a record, and the digests of their questions where rows bring their own."""
        self.num_records = self.num_errors = 0
        self._descriptor: int | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"got --out {str(path)!r}, which is no file; expected one; name another")
        self._stack = ExitStack()
        lock = self.path.with_name(f".{self.path.name}.lock")
        remedy = "expected one process at a time: wait for it, or choose another --out"
        self._stack.enter_context(hold_lock(lock, what=f"--out {str(path)!r}", remedy=remedy))
        try:
            if self.path.exists():
                if not resume:
                    raise ValueError(
                        f"got --out {str(path)!r}, which is there; expected a new file: add --resume to go on with "
                        "it, or name another"
                    )
                self._read_done()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._stack.close()

    def write(self, record: dict[str, Any]) -> None:
        """Append a record.

        Raises:
            ValueError: if the disk takes no more; the file ends with the record before.
        """
        # Half of a surrogate pair, which JSON of a schema can spell, stays the escape that it was.
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            end = os.lseek(self._descriptor, 0, os.SEEK_END)
            num_bytes = os.write(self._descriptor, line)
            if num_bytes < len(line):
                os.ftruncate(self._descriptor, end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            remedy = "make room" if error.errno in _FULL else "see to the disk"
            raise ValueError(
                f"got {self.path}, which takes no more ({error.strerror}); expected room for every record: {remedy}, "
                "then add --resume, which goes on behind the last one"
            ) from error
        self._count(record)

    def _read_done(self) -> None:
        is_own = self.order.asked == (None,)
        for number, (_, record) in enumerate(read_records(self.path), start=1):
            self._check(record, number)
            digest = digest_row(record["key"], record["number"])
            if digest in self.done:
                raise ValueError(
                    f"got {self.path}, whose line {number} has the key {record['key'][:80]!r} again; expected each "
                    "once; take one of the lines out"
                )
            self.done[digest] = digest_question(record["question"]) if is_own else b""
            self._count(record)
        # Only now, as the file is known to be one of answers.
        num_bytes = cut_broken_end(self.path)
        if num_bytes:
            logger.warning(f"{self.path}: the last line is half a record of {num_bytes:,} bytes, which is cut off")

    def _count(self, record: dict[str, Any]) -> None:
        self.num_records += 1
        self.num_errors += "error" in record

    def _check(self, record: dict[str, Any], number: int) -> None:
        expected = {"task": self.order.task, "model": self.order.model, "settings": self.order.settings}
        asked = self.order.asked
        if asked != (None,):
            expected["question"] = asked[record["number"] - 1] if 0 < record["number"] <= len(asked) else "no question"
        for name, value in expected.items():
            if record[name] != value:
                raise ValueError(
                    f"got {name} {_shorten(value)}, and {_shorten(record[name])} in line {number} of {self.path}; "
                    "expected the same to go on with it: choose that, or another --out"
                )


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Where each record begins, and the record; half of one at the end is left out.

    Raises:
        ValueError: naming the line that is no record.
    """
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            is_half = not line.endswith(b"\n")
            record = None if is_half else _parse(line)
            if record is None and not (is_half and line[: len(_START)] == _START[: len(line)]):
                raise ValueError(
                    f"got {path}, whose line {number} is no record of llava batch; expected its own file; name "
                    "another --out, or take the line out"
                )
            if record is not None:
                yield offset, record
            offset += len(line)


def _parse(line: bytes) -> dict[str, Any] | None:
    """A record; None of what is none."""
    try:
        record = json.loads(line)
        is_record = all(name in record for name in _FIELDS) and ("answer" in record) != ("error" in record)
        return record if is_record and isinstance(record["key"], str) and isinstance(record["number"], int) else None
    except (ValueError, TypeError, RecursionError):
        return None


def cut_broken_end(path: Path) -> int:
    """Cut off a last line that has no line break; returns its bytes."""
    with path.open("r+b") as file:
        end = position = file.seek(0, os.SEEK_END)
        while position:
            start = max(0, position - 2**16)
            file.seek(start)
            found = file.read(position - start).rfind(b"\n")
            if found >= 0:
                position = start + found + 1
                break
            position = start
        if position < end:
            file.truncate(position)
        return end - position


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."
