"""Rows in, records out: the questions that are left, an engine that answers them, and one record for each.

Engines take questions one after the other and give them back with an answer or an error, in the order in which they
finish. A question that is wrong, or whose picture is, has an error of its own. If a pass of the model fails, for
example because memory is short, its questions are asked once more, one at a time, before it is theirs.
"""

import dataclasses
import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedModel

from modeling_llava.inference.answer_requests import AnswerRequest, PreparedRequest
from modeling_llava.inference.batched_generation import BatchedGeneration
from modeling_llava.inference.chat_cache import ChatCache
from processing_llava.processing_llava import AnyLlavaProcessor

from .answer_file import AnswerFile, digest_question, digest_row
from .inputs import InputRow, clean
from .tasks import Order

ROW_ERRORS = (ValueError, OSError, TemplateError)
"""What a picture or a text of a row can cause."""
AHEAD = 8
"""Rows that are read and encoded while the model computes."""
MOST_FAILURES = 3
"""So many rows that fail alone, one after the other, are no fault of the rows."""
_SHARED_BYTES = 64 * 2**20
"""Features of pictures that are kept for the next question about them."""


@dataclass(frozen=True)
class Question:
    """One question about one picture."""

    row: InputRow
    number: int
    text: Any

    def build_messages(self, system: str | None) -> list[dict[str, Any]]:
        """The conversation to answer.

        Raises:
            ValueError: if there is no question, or a picture is not allowed.
        """
        pictures = self.row.list_pictures()
        if not isinstance(self.text, str) or not self.text.strip():
            raise ValueError(
                f"got the question {str(self.text)[:80]!r}; expected a text in each row; add it, or ask all rows the "
                "same with --question or --task"
            )
        content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": self.text}]
        messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        return [*messages, {"role": "user", "content": content}]


class Result(NamedTuple):
    """What an engine says to a question."""

    question: Question
    text: str = ""
    finish_reason: str = "stop"
    error: Exception | None = None


class Engine(Protocol):
    """What answers: this package's own batches, or vLLM."""

    def answer(self, questions: Iterable[Question]) -> Iterator[Result]: ...


class Shard(NamedTuple):
    """The part of the rows that one of several machines answers: by the keys, so that parts are the same each time."""

    number: int
    total: int

    @classmethod
    def read(cls, text: str) -> "Shard":
        """A shard as "2/8".

        Raises:
            ValueError: if it is none.
        """
        number, slash, total = text.partition("/")
        if not (slash and number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
            raise ValueError(f"got the shard {text!r}; expected I/N with I from 1 to N, such as 1/8; correct it")
        return cls(int(number), int(total))

    def takes(self, key: str) -> bool:
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.total == self.number - 1


WHOLE = Shard(1, 1)


def list_questions(
    rows: Iterable[InputRow], order: Order, done: dict[bytes, bytes], *, shard: Shard = WHOLE
) -> Iterator[Question]:
    """The questions of a shard that have no record yet.

    Raises:
        ValueError: a row has another question than the one that was answered.
    """
    for row in rows:
        if not shard.takes(row.key):
            continue
        for number, text in enumerate(order.asked, start=1):
            text = row.question if text is None else text
            known = done.get(digest_row(row.key, number))
            if known is None:
                yield Question(row, number, text)
            elif known and known != digest_question(_to_json(text)):
                raise ValueError(
                    f"got the question {str(text)[:80]!r} of {row.key[:80]!r}, which has an answer to another one; "
                    "expected the same: choose another --out"
                )


def answer_questions(questions: Iterable[Question], engine: Engine, file: AnswerFile) -> Iterator[dict[str, Any]]:
    """Write a record for each question; gives what was written."""
    for result in engine.answer(questions):
        record = build_record(result, file.order)
        file.write(record)
        yield record


def build_record(result: Result, order: Order) -> dict[str, Any]:
    """The record of a result, whose answer meets the condition of the task."""
    question, outcome = result.question, {}
    try:
        if result.error is not None:
            raise result.error
        outcome = {"answer": order.finish(result.text), "finish_reason": result.finish_reason}
    except Exception as error:
        if result.error is None and not isinstance(error, ValueError):
            raise
        kind = "" if isinstance(error, ROW_ERRORS) else f"{type(error).__name__}: "
        outcome = {"error": clean(" ".join(f"{kind}{error}".split()))}
    return {
        "key": question.row.key,
        "number": question.number,
        "image": question.row.image,
        "question": _to_json(question.text),
        **outcome,
        "task": order.task,
        "model": order.model,
        "settings": order.settings,
    }


def _to_json(question: Any) -> Any:
    """What stands in a record for a question, which rows of others may have as anything."""
    return clean(question) if isinstance(question, str) else None if question is None else str(question)[:200]


class BatchEngine:
    """Answers in shared passes of `BatchedGeneration`; the next rows are encoded meanwhile, in another thread.

    Args:
        model: A LLaVA of our class, in evaluation mode.
        processor: The processor of the model.
        request: Settings of every answer.
        system: System text to use instead of the template's.
        shares_pictures: Several questions follow each other about one picture.
        The others: see `BatchedGeneration`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: AnyLlavaProcessor,
        *,
        request: AnswerRequest,
        system: str | None = None,
        shares_pictures: bool = False,
        max_rows: int = 16,
        max_cache_tokens: int = 16384,
        compile: bool = False,
    ) -> None:
        self.request = request
        self.system = system
        self.batch = BatchedGeneration(
            model,
            processor,
            max_rows=max_rows,
            max_cache_tokens=max_cache_tokens,
            cache=ChatCache(max_bytes=_SHARED_BYTES if shares_pictures else 0),
            compile=compile,
        )

    def answer(self, questions: Iterable[Question]) -> Iterator[Result]:
        """Answers in the order in which they finish; where the input breaks off, after those of what came before.

        Raises:
            ValueError: if the model fails at one question after the other, each asked alone.
        """
        pool = ThreadPoolExecutor(1)
        try:
            yield from self._answer(iter(questions), pool)
        finally:
            # What is ahead is dropped where somebody stops, instead of being waited for.
            pool.shutdown(cancel_futures=True)

    def _answer(self, questions: Iterator[Question], pool: ThreadPoolExecutor) -> Iterator[Result]:
        batch, is_open, num_failures, broken = self.batch, True, 0, None
        ahead: deque[tuple[Question, Future[PreparedRequest]]] = deque()
        asked: dict[int, Question] = {}
        again: deque[Question] = deque()
        numbers = count()
        while is_open or ahead or asked or again:
            while is_open and len(ahead) < AHEAD:
                try:
                    question = next(questions, None)
                except Exception as error:
                    question, broken = None, error
                is_open = question is not None
                if is_open:
                    ahead.append((question, pool.submit(self._prepare, next(numbers), question)))
            if again and not asked:
                result = self._ask_alone(again.popleft(), pool)
                num_failures = 0 if result.error is None or isinstance(result.error, ROW_ERRORS) else num_failures + 1
                if num_failures == MOST_FAILURES:
                    raise ValueError(
                        f"got {type(result.error).__name__} ({result.error}) from {MOST_FAILURES} rows one after the "
                        "other, each alone; expected a model that answers: mend that, then add --resume"
                    )
                yield result
            elif ahead and not again and not batch.is_full:
                question, future = ahead.popleft()
                try:
                    row = future.result()
                except ROW_ERRORS as error:
                    yield Result(question, error=error)
                    continue
                asked[row.index] = question
                batch.join(row)
            else:
                for answer in batch.step():
                    question = asked.pop(answer.index)
                    if answer.error is None or isinstance(answer.error, ROW_ERRORS):
                        num_failures = 0
                        yield Result(question, answer.text, answer.finish_reason, answer.error)
                    else:
                        again.append(question)
        if broken is not None:
            raise broken

    def _ask_alone(self, question: Question, pool: ThreadPoolExecutor) -> Result:
        try:
            self.batch.join(pool.submit(self._prepare, -1, question).result())
        except ROW_ERRORS as error:
            return Result(question, error=error)
        while not (answers := self.batch.step()):
            pass
        return Result(question, answers[0].text, answers[0].finish_reason, answers[0].error)

    def _prepare(self, index: int, question: Question) -> PreparedRequest:
        request = dataclasses.replace(self.request, messages=question.build_messages(self.system))
        return self.batch.prepare(index, request)
