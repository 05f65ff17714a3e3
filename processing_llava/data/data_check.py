"""Every record of training data checked as training would take it: which can be used, and why the others cannot.

Records are checked in several processes, in chunks, so that only a few chunks are in memory at a time; what is kept
of a usable record is two numbers. What is surprising: processes are started afresh, not forked, and therefore only
once there is more to check than one process does while another starts.
"""

import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any

from tqdm import tqdm

from processing_llava.processing_llava import AnyLlavaProcessor
from processing_llava.text_encoder import list_special_tokens

from .conversations import convert_record, drops_first_turn
from .data_report import ANY, CheckReport
from .data_sources import DataSource, open_records
from .image_folders import ImageFolder
from .record_files import RefusedRecord
from .row_lengths import MeasuredRow, check_length_options, find_spelled_tokens, fit_row, read_image_sizes

CHUNK_SIZE = 100
NUM_CHUNKS_FOR_ONE = 30
"""Smaller data is checked in this process alone: starting others takes seconds."""

Chunk = list[tuple[DataSource, int, Any]]
"""Records, their position and source."""


class RecordCheck:
    """Turns a record into the rows that training would take, or says why not.

    Args:
        processor: That of the model; its template writes the rows, its tokenizer and image settings count them.
        max_length: Longest row in tokens; None for no limit.
        too_long: "keep", "drop" or "split"; see `row_lengths`.
        decode: Read every pixel of the images, not only their headers.
    """

    def __init__(
        self,
        processor: AnyLlavaProcessor,
        *,
        max_length: int | None = None,
        too_long: str = "drop",
        decode: bool = True,
    ) -> None:
        check_length_options(max_length, too_long)
        self.processor = processor
        self.max_length = max_length
        self.too_long = too_long
        self.decode = decode
        self._special_tokens = list_special_tokens(processor.tokenizer)

    def __call__(
        self, record: Any, index: int, *, image_folder: ImageFolder | None = None
    ) -> tuple[list[MeasuredRow], list[RefusedRecord]]:
        """The rows of a record, and what cannot be used of it; never raises for what a record holds."""
        try:
            row = convert_record(record, index, image_folder=image_folder)
            limits = self.processor.image_processor.limits
            sizes = read_image_sizes(row, decode=self.decode, limits=limits)
            return fit_row(row, self.processor, sizes, max_length=self.max_length, too_long=self.too_long)
        except RefusedRecord as refused:
            return [], [refused]

    def find_spelled_tokens(self, rows: Sequence[MeasuredRow]) -> list[str]:
        """The special tokens that the rows of a record hold as text."""
        messages = [message for measured in rows for message in measured.row["messages"]]
        return find_spelled_tokens(messages, self._special_tokens, self.processor.learn_tokens)


def check_sources(
    sources: Iterable[DataSource], check: RecordCheck, *, workers: int, show_progress: bool = False
) -> CheckReport:
    """Checks every record.

    Args:
        sources: Where the records are.
        check: What is checked.
        workers: Processes; several can only be started from the main thread.
        show_progress: Draw a bar on standard error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a source that cannot be read, or a process that was killed.
    """
    if workers < 1:
        raise ValueError(f"got {workers} workers; expected at least 1")
    opened = [(source, *open_records(source)) for source in sources]
    totals = [total for _, total, _ in opened]
    items = ((source, *item) for source, _, records in opened for item in enumerate(records))
    report = CheckReport()
    with tqdm(total=None if None in totals else sum(totals), unit="records", disable=not show_progress) as bar:
        for part in _check_chunks(iter(lambda: list(islice(items, CHUNK_SIZE)), []), check, workers=workers):
            report.add(part)
            bar.update(part.num_records)
    return report


def find_usable_rows(sources: Iterable[DataSource], check: RecordCheck) -> Iterator[MeasuredRow]:
    """The usable rows one by one, in this process."""
    for source in sources:
        for index, record in enumerate(open_records(source)[1]):
            yield from check(record, index, image_folder=source.images)[0]


def _check_chunks(chunks: Iterator[Chunk], check: RecordCheck, *, workers: int) -> Iterator[CheckReport]:
    """One report for each chunk, in their order."""
    first = list(islice(chunks, NUM_CHUNKS_FOR_ONE))
    if workers == 1 or len(first) < NUM_CHUNKS_FOR_ONE:
        yield from (_check_chunk(chunk, check) for chunk in chain(first, chunks))
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(check,))
    try:
        with _interrupts_ignored():
            waiting = deque(pool.submit(_check_in_worker, chunk) for chunk in first)
        for chunk in chunks:
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
            waiting.append(pool.submit(_check_in_worker, chunk))
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"got a process that was killed while it checked records, perhaps for its memory; expected {workers} that "
            "finish; use fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started here ignore Ctrl-C. It reaches every process of a terminal; the first one ends the others."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _check_chunk(chunk: Chunk, check: RecordCheck) -> CheckReport:
    report = CheckReport()
    for source, index, record in chunk:
        rows, refused = check(record, index, image_folder=source.images)
        report.count(rows, refused, source=source.path)
        report.num_cut += bool(rows) and drops_first_turn(record)
        if spelled := check.find_spelled_tokens(rows):
            report.spelled.update([ANY, *spelled])
    return report


def _start_worker(check: RecordCheck) -> None:
    # Sent once to each process and not with each chunk: a tokenizer takes longer to unpack than a chunk to check.
    global _worker_check
    _worker_check = check


def _check_in_worker(chunk: Chunk) -> CheckReport:
    return _check_chunk(chunk, _worker_check)
