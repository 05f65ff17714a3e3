"""How much one record, and one file of Parquet, may hold: a small file can stand for any amount of memory and time.

What is surprising: Parquet writes a value once and its place in the file as often as it stands there, so the sizes in
its footer say nothing of the rows (Apache Parquet format, Encodings). Values that may be many times larger are counted
before `datasets` writes them to its cache.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_RECORD_CHARACTERS = 12 * 2**20
"""Of a record in JSON, pictures in Base64 included."""
MOST_TEXT_CHARACTERS = 2**20
"""Of all texts of a record together."""
MOST_LEVELS = 50
"""Lists and objects in each other."""
_PICTURE_KEYS = frozenset({"image", "images", "image_url", "url", "bytes", "base64", "data", "path"})

LEAST_PARQUET_BYTES = 2**28
LARGEST_RATIO = 100
"""Rows of a file may take `LEAST_PARQUET_BYTES`, or so many times its size."""
_BATCH_BYTES = 2**25
_LEAST_RECORD_BYTES = 100
"""What a record takes in memory and time, whatever it holds."""


def find_excess(record: Any) -> str | None:
    """What there is too much of in a record; None of one to go on with."""
    level, num_levels, num_characters = [record], 0, 0
    while level:
        num_levels += 1
        if num_levels > MOST_LEVELS:
            return f"more than {MOST_LEVELS} lists and objects in each other"
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                texts = [item for key, item in value.items() if isinstance(item, str) and key not in _PICTURE_KEYS]
                num_characters += sum(map(len, texts))
                below.extend(item for item in value.values() if isinstance(item, (dict, list)))
            elif isinstance(value, list):
                below.extend(item for item in value if isinstance(item, (dict, list)))
        level = below
    if num_characters > MOST_TEXT_CHARACTERS:
        return f"{num_characters:,} characters of text, more than {MOST_TEXT_CHARACTERS:,}"
    return None


def check_parquet(path: str | Path) -> None:
    """Refuse a file of Parquet whose rows take out of proportion more than the file.

    Raises:
        ValueError: naming it and both sizes, or if it cannot be read.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    size = os.path.getsize(path)
    most = max(LEAST_PARQUET_BYTES, LARGEST_RATIO * size)
    try:
        with ParquetFile(path) as file:
            # Decoding costs time, and most files cannot hold so much.
            for measure in (_estimate_chunks, _measure_chunks):
                total = _LEAST_RECORD_BYTES * file.metadata.num_rows
                for num_bytes in measure(file, path):
                    total += num_bytes
                    if total > most:
                        break
                else:
                    return
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"got the data {str(path)!r}, which is no whole file of Parquet ({error}); expected one; copy it again"
        ) from error
    raise ValueError(
        f"got the data {str(path)!r}, {size:,} bytes whose rows take more than {most:,}; expected at most "
        f"{LARGEST_RATIO} times its size: write it with less repetition, or as JSON"
    )


def _estimate_chunks(file: Any, path: str | Path) -> Iterator[int]:
    """The most bytes that each column of each group of rows can take, as far as their headers tell."""
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group)
        for column in map(rows.column, range(rows.num_columns)):
            largest = 8
            if column.has_dictionary_page:
                largest = max(8, _read_page_size(path, column.dictionary_page_offset))
            yield max(column.total_uncompressed_size, largest * column.num_values)


def _measure_chunks(file: Any, path: str | Path) -> Iterator[int]:
    """The bytes of each column; of one with a dictionary, batch by batch."""
    from pyarrow import DictionaryArray

    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group)
        for column in map(rows.column, range(rows.num_columns)):
            if not column.has_dictionary_page:
                yield max(column.total_uncompressed_size, 8 * column.num_values)
                continue
            largest = max(8, _read_page_size(path, column.dictionary_page_offset))
            per_row = largest * max(1, column.num_values // max(rows.num_rows, 1))
            num_rows = max(1, min(10_000, _BATCH_BYTES // per_row))
            for batch in file.iter_batches(num_rows, row_groups=[group], columns=[column.path_in_schema]):
                for values in batch.columns:
                    yield (values.dictionary_decode() if isinstance(values, DictionaryArray) else values).nbytes


def _read_page_size(path: str | Path, offset: int) -> int:
    """Bytes of a page before compression: the second number of its header, in Thrift's compact protocol."""
    with open(path, "rb") as file:
        file.seek(offset)
        header = file.read(32)
    numbers, position = [], 0
    while len(numbers) < 2 and position < len(header) and header[position] == 0x15:
        value, shift, position = 0, 0, position + 1
        while position < len(header):
            value |= (header[position] & 0x7F) << shift
            shift, position = shift + 7, position + 1
            if header[position - 1] < 0x80:
                break
        numbers.append(value >> 1)
    if len(numbers) < 2:
        raise ValueError(
            f"got the data {str(path)!r}, a page of which has no header; expected a whole file; copy it again"
        )
    return numbers[1]
