"""Training data checked as training would take it: which records can be used, and why the others cannot.

Records are checked in several processes, in chunks, so that only a few chunks are in memory at a time; a usable record
leaves its counts alone. What is surprising: processes are started afresh, not forked, and therefore only once there is
more to check than one process does while another starts.
"""

import signal
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any

import numpy as np
from tqdm import tqdm

from processing_llava.processing_llava import AnyLlavaProcessor
from processing_llava.prompt_ids import list_special_tokens

from .conversations import convert_record, drops_first_turn
from .data_bounds import RefusedRecord
from .data_sources import DataSource, ImageFolder, open_records
from .row_lengths import FITS, MeasuredRow, check_length_options, find_spelled_tokens, fit_row, read_image_sizes

CHUNK_SIZE = 100
NUM_CHUNKS_FOR_ONE = 30
"""Smaller data is checked in this process alone: starting others takes seconds."""
PERCENTILES = (50, 90, 99, 100)
ANY = "any"
_NUM_SHOWN = 5
"""Ids and tokens that a line of the table names."""

Chunk = list[tuple[DataSource, int, Any]]
"""Records, their position and source."""


class RecordCheck:
    """Turns a record into the rows that training would take, or says why not.

    Args:
        processor: The model's; its template writes the rows, its tokenizer and image settings count them.
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


@dataclass(frozen=True)
class Refusal:
    """One record, or one question of it, that cannot be used."""

    source: str
    id: str
    reason: str
    message: str


@dataclass
class CheckReport:
    """What is known of records so far: counts of the usable ones, and the others by name."""

    num_records: int = 0
    num_cut: int = 0
    """Usable records whose first turn is one of the assistant, which is left out."""
    spelled: Counter = field(default_factory=Counter)
    """For each special token how many usable records spell it in characters; "any" counts the records that do."""
    num_supervised: int = 0
    """Tokens that are learned."""
    lengths: array = field(default_factory=lambda: array("L"))
    """Tokens of each usable row, images counted."""
    fates: Counter = field(default_factory=Counter)
    """How many usable rows fit, are too long but kept, and are parts."""
    refusals: list[Refusal] = field(default_factory=list)

    def count(self, rows: Iterable[MeasuredRow], refused: Iterable[RefusedRecord], *, source: str) -> None:
        """Counts one record in: the rows that it gives, and what cannot be used of it."""
        self.num_records += 1
        for measured in rows:
            self.lengths.append(measured.num_tokens)
            self.num_supervised += measured.num_supervised
            self.fates[measured.fate] += 1
        self.refusals += [Refusal(source, error.record_id, error.reason, str(error)) for error in refused]

    def add(self, other: "CheckReport") -> None:
        """Counts in what is known of other records."""
        self.num_records += other.num_records
        self.num_cut += other.num_cut
        self.spelled += other.spelled
        self.num_supervised += other.num_supervised
        self.lengths += other.lengths
        self.fates += other.fates
        self.refusals += other.refusals

    def percentiles(self) -> dict[int, int]:
        """For each of `PERCENTILES` the length in tokens that so many rows do not exceed."""
        if not self.lengths:
            return {}
        lengths = np.percentile(np.asarray(self.lengths), PERCENTILES, method="higher")
        return dict(zip(PERCENTILES, map(int, lengths)))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {
            "records": self.num_records,
            "usable_rows": len(self.lengths),
            "first_turns_left_out": self.num_cut,
            "spelled_special_tokens": dict(self.spelled),
            "fates": dict(self.fates),
            "tokens": sum(self.lengths),
            "supervised_tokens": self.num_supervised,
            "length_percentiles": self.percentiles(),
            "refused": [asdict(refusal) for refusal in self.refusals],
        }

    def format_table(self) -> str:
        """What people read: totals, then for each reason a few ids and the first message."""
        num_tokens = sum(self.lengths)
        share = f" ({self.num_supervised / num_tokens:.1%})" if num_tokens else ""
        spread = ", ".join(f"{length:,} ({percent}%)" for percent, length in self.percentiles().items())
        cells = {
            "records": f"{self.num_records:,}",
            "usable rows": f"{len(self.lengths):,}",
            **{f"  {fate}": f"{count:,}" for fate, count in self.fates.items() if fate != FITS},
            **({"  first turn left out": f"{self.num_cut:,}"} if self.num_cut else {}),
            **({"  spell tokens": self._format_spelled()} if self.spelled else {}),
            "tokens": f"{num_tokens:,}",
            "supervised tokens": f"{self.num_supervised:,}{share}",
            "tokens a row, up to": spread or "-",
            "refused": f"{len(self.refusals):,}",
        }
        lines = [f"{name:22}{value}" for name, value in cells.items()]
        for reason, count in Counter(refusal.reason for refusal in self.refusals).most_common():
            same = [refusal for refusal in self.refusals if refusal.reason == reason]
            ids = ", ".join(refusal.id for refusal in same[:_NUM_SHOWN]) + (", ..." if count > _NUM_SHOWN else "")
            lines += [f"  {reason:19} {count:,}: {ids}", f"    {same[0].message}"]
        return "\n".join(lines)

    def _format_spelled(self) -> str:
        names = [name for name, _ in self.spelled.most_common() if name != ANY]
        tokens = ", ".join(f"{name} {self.spelled[name]:,}" for name in names[:_NUM_SHOWN])
        return (
            f"{self.spelled[ANY]:,}: {tokens}{', ...' if len(names) > _NUM_SHOWN else ''} (--learn-token, for answers)"
        )


def check_sources(
    sources: Iterable[DataSource], check: RecordCheck, *, workers: int, show_progress: bool = False
) -> CheckReport:
    """Checks every record.

    Args:
        sources: Where the records are.
        check: Decides about each record.
        workers: Processes; several can only be started from the main thread.
        show_progress: Show a bar on standard error.

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
