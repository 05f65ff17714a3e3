"""EngineThread: a batch that runs in a thread of its own, and what clients of a server hear of it.

Requests are prepared (pictures decoded, text tokenised) in the thread of whoever submits them, one at a time, while
the batch goes on. They join between two steps. A client that leaves frees its row at the next step.

What is surprising: the number of a request is known before it is prepared, so that a client that leaves meanwhile can
take it back: its request then never joins.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock, Thread

from starlette.concurrency import run_in_threadpool

from modeling_llava.inference.answer_requests import AnswerRequest, BatchedAnswer, PreparedRequest, TokenLogprobs
from modeling_llava.inference.batched_generation import BatchedGeneration
from modeling_llava.inference.token_stream import StreamedText

from .guard import log_error


class Busy(ValueError):
    """More requests than may wait."""


@dataclass(frozen=True)
class AnswerPart:
    """What a step has added to an answer."""

    text: str
    """Characters that are certain by now; they add up to the text of the answer."""
    logprobs: list[TokenLogprobs]
    answer: BatchedAnswer | None = None
    """The whole answer, with the last part."""


class EngineThread:
    """Answers requests of many clients in one batch.

    Args:
        batch: The batch; nothing else may step it.
        max_open: Requests that may be running or waiting.
    """

    def __init__(self, batch: BatchedGeneration, *, max_open: int) -> None:
        self.batch = batch
        self.max_open = max_open
        self._numbers = itertools.count()
        self._preparing = Lock()
        self._followers: dict[int, _Follower] = {}
        self._news: SimpleQueue[PreparedRequest | int | None] = SimpleQueue()
        """Requests that join, numbers of those that leave, and None at the end."""
        self._thread = Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    @property
    def num_open(self) -> int:
        return len(self._followers)

    @property
    def num_running(self) -> int:
        return len(self.batch.running)

    def begin(self, request: AnswerRequest, tell: Callable[[AnswerPart], None]) -> int:
        """A place for a request, by its number; `tell` gets its parts, in the thread of the batch.

        Raises:
            Busy: if there is none.
        """
        if self.num_open >= self.max_open:
            raise Busy(f"got more than {self.max_open} requests at a time; expected fewer; try again later")
        number = next(self._numbers)
        processor = self.batch.processor
        text = StreamedText(
            processor.tokenizer, end=self.batch.end, stop=request.stop, learn_tokens=processor.learn_tokens
        )
        self._followers[number] = _Follower(text, tell)
        return number

    def submit(self, number: int, request: AnswerRequest) -> None:
        """Let a request join that has a place.

        Raises:
            ValueError: if it is refused; its place is free again once it has left.
        """
        with self._preparing:
            if number in self._followers:
                self._news.put(self.batch.prepare(number, request))

    def leave(self, number: int) -> None:
        """Free the place of a request, which may have been answered."""
        if self._followers.pop(number, None) is not None:
            self._news.put(number)

    async def answer(self, request: AnswerRequest) -> AsyncIterator[AnswerPart]:
        """The parts of an answer; closing the iterator makes the request leave.

        Raises:
            Busy, ValueError: if the request is refused.
        """
        parts = _Mailbox()
        number = self.begin(request, parts.put)
        try:
            await run_in_threadpool(self.submit, number, request)
            while True:
                part = await parts.get()
                if part.answer is not None and part.answer.error is not None:
                    raise part.answer.error
                yield part
                if part.answer is not None:
                    return
        finally:
            self.leave(number)

    def close(self) -> None:
        """Finish what is running, and end."""
        self._news.put(None)
        self._thread.join()

    def _run(self) -> None:
        is_closing = False
        while not (is_closing and not self.batch.num_requests):
            while not self._news.empty() or not (self.batch.num_requests or is_closing):
                news = self._news.get()
                if news is None:
                    is_closing = True
                elif isinstance(news, int):
                    self.batch.leave(news)
                elif news.index in self._followers:
                    self.batch.join(news)
            answers = self._step()
            for row in self.batch.running:
                self._tell(row.index, row.ids, row.logprobs, None)
            for answer in answers:
                if answer.error is not None and not isinstance(answer.error, ValueError):
                    log_error(answer.error)
                self._tell(answer.index, answer.ids, answer.logprobs, answer)

    def _step(self) -> list[BatchedAnswer]:
        """A step; where it fails as a whole, no request is left waiting."""
        try:
            return self.batch.step()
        except Exception as error:
            lost = list(self._followers)
            for number in lost:
                self.batch.leave(number)
            return [BatchedAnswer(number, error=error.with_traceback(None)) for number in lost]

    def _tell(self, number: int, ids: list[int], logprobs: list[TokenLogprobs], answer: BatchedAnswer | None) -> None:
        follower = self._followers.get(number)
        if follower is None:
            return
        text = "".join(follower.text.add(token) for token in ids[len(follower.text.ids) :])
        if answer is not None:
            text += answer.text.removeprefix(follower.text.given)
        part = AnswerPart(text, logprobs[follower.num_logprobs :], answer)
        follower.num_logprobs = len(logprobs)
        follower.tell(part)


@dataclass
class _Follower:
    text: StreamedText
    tell: Callable[[AnswerPart], None]
    num_logprobs: int = 0


class _Mailbox:
    """A queue from the thread of a batch to the event loop that makes it; what comes after its end is lost."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[AnswerPart] = asyncio.Queue()
        self.get = self._queue.get

    def put(self, part: AnswerPart) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, part)
