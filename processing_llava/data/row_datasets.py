"""The rows of all sources as one dataset to train on, their lengths, and what becomes of those that are too long.

Inside a dataset pictures are the `{"bytes", "path"}` of `datasets`, so that all sources have the same columns and can
be mixed; what is read from it holds paths or bytes. Rows that are not streaming are written once to the cache of
`datasets`; the rows of JSON files are kept in memory, as Arrow tables.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import (
    Dataset,
    Features,
    Image,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
)
from torch.utils.data import get_worker_info
from transformers.utils import logging

from processing_llava.image_arrays import ArrayImage
from processing_llava.processing_llava import AnyLlavaProcessor

from .conversations import ADDRESS, convert_record, drops_first_turn
from .data_bounds import RefusedRecord, bound_record
from .data_sources import DataSource, ImageFolder, JsonParts, find_json_parts, open_dataset, stream_parts
from .row_lengths import (
    CUT,
    DROPPED,
    FITS,
    KEPT,
    ON_BAD_ROW,
    PART,
    SKIPPED,
    SPELLED,
    check_length_options,
    find_spelled_tokens,
    fit_row,
    read_image_sizes,
)

logger = logging.get_logger(__name__)

ROW_FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(Image(decode=False)),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
    }
)
"""The columns of every source, so that sources can be mixed."""

_JUDGEMENT = Features(
    {"fate": Value("string"), "problem": Value("string"), "is_cut": Value("bool"), "is_spelled": Value("bool")}
)
"""`fate` is null for a row that was not measured, `problem` for one that can be used."""
_JUDGED = Features({**ROW_FEATURES, **_JUDGEMENT, "digest": Value("binary")})
_MEASURED = Features({**_JUDGED, "num_tokens": Value("int32"), "num_images": Value("int32")})
_CHUNK = 1000
_ROWS_PER_PROCESS = 2000
"""Fewer are measured faster by one process than another one starts."""

_COLUMNS = {fate: column for column, fate in enumerate((FITS, KEPT, PART, DROPPED, SKIPPED, CUT, SPELLED))}
_MOST_WORKERS = 1024


class FateCounts(Mapping[str, int]):
    """How many rows have each fate, counted in a process and in the workers of its data loaders.

    A fate that no row had is missing. Streaming rows are read by workers: each adds to a row of its own in memory that
    they share, so that no lock is needed.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(1 + _MOST_WORKERS, len(_COLUMNS), dtype=torch.int64).share_memory_()

    def add(self, fate: str) -> None:
        worker = get_worker_info()
        self._counts[0 if worker is None else 1 + worker.id, _COLUMNS[fate]] += 1

    def clear(self) -> None:
        self._counts.zero_()

    def __getitem__(self, fate: str) -> int:
        count = int(self._counts[:, _COLUMNS[fate]].sum())
        if count == 0:
            raise KeyError(fate)
        return count

    def __iter__(self) -> Iterator[str]:
        return (fate for fate, count in zip(_COLUMNS, self._counts.sum(dim=0).tolist()) if count)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def load_rows(
    sources: Sequence[DataSource],
    *,
    seed: int = 0,
    processor: AnyLlavaProcessor | None = None,
    max_length: int | None = None,
    too_long: str = "drop",
    on_bad_row: str = "raise",
    num_proc: int | None = None,
    special_tokens: Sequence[str] = (),
    learn_tokens: Sequence[str] = (),
    with_digests: bool = False,
) -> tuple[Dataset | IterableDataset, FateCounts]:
    """The rows of all sources: `id`, `images` (paths or bytes), `messages`.

    Without weights the sources follow each other. With weights the source of each row is sampled, until every row of
    every source was read once; shorter sources begin again. Same sources and seed, same order.

    Args:
        sources: At least one.
        seed: Seed of the sampler and of shuffling.
        processor: Counts tokens, which a limit needs. The dataset then has two columns more: `num_tokens`, image
            features counted, and `num_images`. They are read with `with_format(None)`; rows do not show them.
        max_length: Longest row in tokens; None for no limit.
        too_long: "keep", "drop" or "split"; see `row_lengths`.
        on_bad_row: "raise", or "skip" records that cannot be used; each is logged.
        num_proc: Processes that count, where there are enough rows for several.
        special_tokens: Rows that spell one of these are counted.
        learn_tokens: Special tokens that are not counted in answers.
        with_digests: Keep the column that `count_shared_rows` reads.

    Returns:
        A `Dataset`, or an `IterableDataset` if any source is streaming; and how many rows of the sources are of each
        fate: `SKIPPED`, `CUT`, `SPELLED`, and with a processor `FITS`, `KEPT`, `PART`, and `DROPPED`, which counts
        questions where rows are split. Rows of streaming sources are counted when they are read, each time and in the
        process that reads.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a source that cannot be read, a record that cannot be used, an unknown option, or weights for some
            sources only.
    """
    check_length_options(max_length, too_long)
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"got on_bad_row={on_bad_row!r}; expected one of {', '.join(ON_BAD_ROW)}")
    weights = [source.weight for source in sources if source.weight is not None]
    if not sources or len(weights) not in (0, len(sources)):
        raise ValueError(
            f"got {len(weights)} weights for {len(sources)} sources; expected at least one source, and a weight for "
            "each of them or for none"
        )
    convert = partial(
        _convert, on_bad_row=on_bad_row, special_tokens=tuple(special_tokens), learn_tokens=tuple(learn_tokens)
    )
    parts = [_load_source(source, convert) for source in sources]
    parts = [
        part if source.shuffle_buffer is None else part.shuffle(seed, buffer_size=source.shuffle_buffer)
        for part, source in zip(parts, sources)
    ]
    fates = FateCounts()
    if processor is not None:
        fit = partial(_fit_batch, processor=processor, max_length=max_length, too_long=too_long, on_bad_row=on_bad_row)
        parts = [_fit(part, fit, num_proc=num_proc) for part in parts]
    parts = [_leave_out(part, fates) for part in parts]
    if any(source.streaming for source in sources):
        parts = [part if isinstance(part, IterableDataset) else part.to_iterable_dataset() for part in parts]
    if weights:
        probabilities = [weight / sum(weights) for weight in weights]
        rows = interleave_datasets(parts, probabilities, seed=seed, stopping_strategy="all_exhausted")
    else:
        rows = concatenate_datasets(parts)
    return _unpack(rows.remove_columns([*_JUDGEMENT, *["digest"] * (not with_digests)])), fates


def _load_source(source: DataSource, convert: Callable[..., dict[str, Any]]) -> Dataset | IterableDataset:
    parts = find_json_parts(source)
    if not parts:
        records = open_dataset(source)
        return records.map(
            partial(convert, image_folder=source.images),
            with_indices=True,
            remove_columns=records.column_names,
            features=_JUDGED,
        )
    # A tuple: lists are split into shards, whose records are numbered anew (datasets 5.2, utils/sharding.py).
    settings = {"parts": parts, "convert": partial(convert, image_folder=source.images)}
    if source.streaming:
        return IterableDataset.from_generator(_generate, features=_JUDGED, gen_kwargs=settings)
    rows = _generate(**settings)
    # As Python objects, all rows would take several times the memory of their table.
    chunks = iter(lambda: list(islice(rows, _CHUNK)), [])
    tables = [Dataset.from_list(chunk, features=_JUDGED) for chunk in chunks]
    if not tables:
        raise ValueError(f"got no records in {source.path}; expected at least one; take it out of the sources")
    return concatenate_datasets(tables)


def _generate(parts: JsonParts, convert: Callable[..., dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for index, record in enumerate(stream_parts(parts)):
        yield convert(record, index)


def _convert(
    record: Any,
    index: int,
    *,
    image_folder: ImageFolder | None,
    on_bad_row: str,
    special_tokens: tuple[str, ...],
    learn_tokens: tuple[str, ...],
) -> dict[str, Any]:
    # A row of `datasets` is a mapping that reads its columns late (datasets 5.2, formatting/formatting.py).
    record = dict(record) if isinstance(record, Mapping) else record
    record = bound_record(record, f"record {index + 1}")
    try:
        row = convert_record(record, index, image_folder=image_folder)
    except RefusedRecord as refused:
        if on_bad_row == "raise":
            raise
        empty = {"id": refused.record_id, "images": [], "messages": []}
        judgement = {"fate": SKIPPED, "problem": str(refused), "is_cut": False, "is_spelled": False}
        return {**empty, **judgement, "digest": b""}
    is_spelled = bool(find_spelled_tokens(row["messages"], special_tokens, learn_tokens))
    judgement = {"fate": None, "problem": None, "is_cut": drops_first_turn(record), "is_spelled": is_spelled}
    packed = _pack_row(row)
    return {**packed, **judgement, "digest": _digest(packed)}


def _digest(packed: dict[str, Any]) -> bytes:
    """What is the same for two rows with the same pictures, by their bytes or paths, and the same conversation."""
    digest = hashlib.blake2b(json.dumps(packed["messages"]).encode(), digest_size=12)
    for image in packed["images"]:
        digest.update(image["bytes"] or str(image["path"]).encode())
    return digest.digest()


def count_shared_rows(rows: Dataset, others: Dataset) -> int:
    """How many rows of a dataset of `load_rows`, with digests, are in another one too, whatever their ids."""
    known = set(others.with_format(None)["digest"][:])
    return sum(digest in known for digest in rows.with_format(None)["digest"][:])


def _pack_row(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "images": [_pack_image(image) for image in row["images"]]}


def _pack_image(image: Any) -> dict[str, Any]:
    if isinstance(image, (np.ndarray, torch.Tensor)):
        array = ArrayImage(image)
        image = array.crop((0, 0, *array.size))
    return Image().encode_example(str(image) if isinstance(image, Path) else image)


def _unpack(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    if isinstance(rows, IterableDataset):
        return rows.select_columns(list(ROW_FEATURES)).map(_unpack_batch, batched=True, batch_size=1)
    return rows.with_transform(_unpack_batch)


def _unpack_batch(batch: dict[str, list]) -> dict[str, list]:
    if "images" not in batch:
        # Another column was asked for by its name.
        return batch
    rows = {name: batch[name] for name in ROW_FEATURES}
    return {**rows, "images": [_unpack_images(images) for images in batch["images"]]}


def _unpack_images(images: list[dict[str, Any]]) -> list[str | bytes | Path]:
    """Bytes and paths; a URI stays a text."""
    sources = (image["bytes"] or image["path"] for image in images)
    return [source if isinstance(source, bytes) or ADDRESS.match(source) else Path(source) for source in sources]


def _fit(
    rows: Dataset | IterableDataset, fit: Callable[[dict[str, list]], dict[str, list]], *, num_proc: int | None
) -> Dataset | IterableDataset:
    if isinstance(rows, IterableDataset):
        return rows.map(fit, batched=True, batch_size=_CHUNK, features=_MEASURED)
    if len(rows) < _ROWS_PER_PROCESS:
        num_proc = None
    return rows.map(
        fit, batched=True, batch_size=_CHUNK, features=_MEASURED, num_proc=num_proc, desc="Counting tokens"
    )


def _fit_batch(
    batch: Mapping[str, list],
    *,
    processor: AnyLlavaProcessor,
    max_length: int | None,
    too_long: str,
    on_bad_row: str,
) -> dict[str, list]:
    fitted: list[dict[str, Any]] = []
    for values in zip(*(batch[name] for name in _JUDGED)):
        packed = dict(zip(_JUDGED, values))
        unusable = {**packed, "num_tokens": 0, "num_images": 0, "is_cut": False, "is_spelled": False}
        if packed["fate"] == SKIPPED:
            fitted.append(unusable)
            continue
        row = {**{name: packed[name] for name in ROW_FEATURES}, "images": _unpack_images(packed["images"])}
        try:
            sizes = read_image_sizes(row, decode=False, limits=processor.image_processor.limits)
            kept, refused = fit_row(row, processor, sizes, max_length=max_length, too_long=too_long)
        except RefusedRecord as problem:
            if on_bad_row == "raise":
                raise
            fitted.append({**unusable, "fate": SKIPPED, "problem": str(problem)})
            continue
        for number, measured in enumerate(kept):
            counts = {"num_tokens": measured.num_tokens, "num_images": len(measured.row["images"])}
            # Counted once for each record.
            counted = {name: packed[name] and number == 0 for name in ("is_cut", "is_spelled")}
            judgement = {"fate": measured.fate, "problem": None, **counted, "digest": packed["digest"]}
            fitted.append({**_pack_row(measured.row), **counts, **judgement})
        fitted += [{**unusable, "fate": DROPPED} for _ in refused]
    return {name: [row[name] for row in fitted] for name in _MEASURED}


def _leave_out(rows: Dataset | IterableDataset, fates: FateCounts) -> Dataset | IterableDataset:
    """Without the rows that are too long or cannot be used; all are counted, and the latter logged."""
    judge = _Judge(fates)
    if isinstance(rows, IterableDataset):
        return rows.filter(judge, input_columns=list(_JUDGEMENT))
    # Not in the filter, whose result comes from the cache the next time (datasets 5.2, arrow_dataset.py).
    remain = [judge(*judgement) for judgement in zip(*(rows[name][:] for name in _JUDGEMENT))]
    return rows if all(remain) else rows.filter(_remains, input_columns="fate")


class _Judge:
    """Whether a row remains, by its fate, which is counted."""

    def __init__(self, fates: FateCounts) -> None:
        self.fates = fates

    def __call__(self, fate: str | None, problem: str | None, is_cut: bool, is_spelled: bool) -> bool:
        if fate is not None:
            self.fates.add(fate)
        if is_cut:
            self.fates.add(CUT)
        if is_spelled:
            self.fates.add(SPELLED)
        if problem is not None:
            logger.warning(f"skipped: {problem}")
        return _remains(fate)

    def __deepcopy__(self, memo: dict) -> "_Judge":
        # The sources of a mixture are copied (datasets 5.2, iterable_dataset.py), and counted together.
        return self


def _remains(fate: str | None) -> bool:
    return fate not in (DROPPED, SKIPPED)
