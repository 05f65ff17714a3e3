"""What data of strangers may hold: so much in one record or file, and names of its own files alone.

A small file can stand for any amount of memory and time. And a model that was trained on a file of this machine can
tell what was in it: README.md and .huggingface.yaml of a folder name patterns that `datasets` looks up, absolute ones,
those with `..`, and addresses on the network too (datasets 5.2, data_files.py); `state.json` of a saved dataset names
files as freely.

What is surprising: Parquet writes a value once and its place in the file as often as it stands there, so the sizes in
its footer say nothing of the rows (Apache Parquet format, Encodings). Values that may be many times larger are counted
before `datasets` writes them to its cache.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

MOST_RECORD_CHARACTERS = 12 * 2**20
"""Of a record in JSON, pictures in Base64 included."""
MOST_TEXT_CHARACTERS = 2**20
"""Of all texts of a record together."""
MOST_LEVELS = 50
"""Lists and objects in each other."""
_PICTURE_KEYS = frozenset({"image", "images", "image_url", "url", "bytes", "base64", "data", "path"})


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


def bound_record(record: Any, record_id: str) -> Any:
    """A record as it is, or the `RefusedRecord` that says what there is too much of in it."""
    excess = find_excess(record)
    if excess is None:
        return record
    return RefusedRecord(record_id, "too much in a record", excess, "expected less; split the record or take it out")


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


# Files of Parquet.

LEAST_PARQUET_BYTES = 2**28
LARGEST_RATIO = 100
"""Rows of a file may take `LEAST_PARQUET_BYTES`, or so many times its size."""
_BATCH_BYTES = 2**25
_LEAST_RECORD_BYTES = 100
"""What a record takes in memory and time, whatever it holds."""


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


# Folders and Hub datasets.

_CARDS = ("README.md", ".huggingface.yaml")
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", flags=re.DOTALL)
MOST_YAML_CHARACTERS, MOST_YAML_ITEMS = 100_000, 20_000
"""Of a card or recipe, and of the items that it stands for."""


def check_card(path: str | Path) -> None:
    """Refuse a folder whose cards name data elsewhere, before `datasets` looks for it.

    Raises:
        ValueError: naming the card and what it names.
    """
    for card in (Path(path) / name for name in _CARDS):
        if not card.is_file():
            continue
        with card.open(encoding="utf-8", errors="replace") as file:
            text = file.read(MOST_YAML_CHARACTERS)
        if card.suffix == ".md":
            matter = _FRONT_MATTER.match(text)
            text = matter[1] if matter else ("" if len(text) < MOST_YAML_CHARACTERS else text)
        for pattern in _find_patterns(_read_fields(text, card)):
            if "::" in pattern or "://" in pattern or os.path.isabs(pattern) or ".." in Path(pattern).parts:
                raise _outside(card, pattern, "another place")


def check_saved(path: str | Path, *, follow_links: bool) -> None:
    """Refuse a folder of `save_to_disk` whose splits or tables lie elsewhere.

    Raises:
        ValueError: naming the file and what it names, or if it cannot be read.
    """
    path = Path(path)
    folders = [path]
    if (path / "dataset_dict.json").is_file():
        splits = [str(split) for split in _read_json(path / "dataset_dict.json").get("splits") or ()]
        check_inside(path, splits, by="dataset_dict.json", follow_links=follow_links)
        folders = [path / split for split in splits]
    for folder in filter(lambda folder: (folder / "state.json").is_file(), folders):
        tables = [str(item.get("filename")) for item in _read_json(folder / "state.json").get("_data_files") or ()]
        check_inside(folder, tables, by="state.json", follow_links=follow_links)


def check_inside(path: str | Path, names: Iterable[str], *, by: str, follow_links: bool) -> None:
    """Refuse names that lead out of a folder.

    Args:
        by: What names them.
        follow_links: Symbolic links in the folder may.

    Raises:
        ValueError: naming the first one.
    """
    resolve = os.path.abspath if follow_links else os.path.realpath
    root = resolve(path)
    for name in names:
        found = resolve(os.path.join(root, name))
        if "::" in name or "://" in name or os.path.commonpath([root, found]) != root:
            raise _outside(Path(path) / by, name, found)


def _outside(card: Path, name: str, found: str) -> ValueError:
    return ValueError(
        f"got {card}, which names the data {name[:80]!r} in {found[:200]}; expected files inside of its folder: "
        "correct it, or allow links that you made yourself (follow_links, --follow-links)"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")[:MOST_YAML_CHARACTERS])
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"got {path} ({type(error).__name__}); expected what save_to_disk wrote: copy it again"
        ) from error


def _read_fields(text: str, card: Path) -> Any:
    """The fields of a card, if aliases do not make them more than a card can hold."""
    if len(text) >= MOST_YAML_CHARACTERS:
        raise ValueError(f"got {card} with more than {MOST_YAML_CHARACTERS:,} characters; expected fewer: shorten it")
    try:
        if exceeds_items(yaml.compose(text, yaml.SafeLoader)):
            raise ValueError(f"got {card} with more than {MOST_YAML_ITEMS:,} items; expected fewer: shorten it")
        return yaml.load(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"got {card}, whose fields are no YAML ({reason}); expected some, or none: correct it"
        ) from error


def exceeds_items(root: yaml.Node | None) -> bool:
    """Whether a text in YAML stands for more items than a person writes, as aliases of aliases do.

    It is asked before anything is made of them: a merge of aliases (<<) copies what they stand for (PyYAML 6.0,
    constructor.py).
    """
    nodes, num_nodes = [] if root is None else [root], 0
    while nodes and num_nodes <= MOST_YAML_ITEMS:
        node = nodes.pop()
        num_nodes += 1 + (len(node.value) // 100 if isinstance(node, yaml.ScalarNode) else 0)
        if isinstance(node, yaml.MappingNode):
            nodes.extend(part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            nodes.extend(node.value)
    return num_nodes > MOST_YAML_ITEMS


def _find_patterns(fields: Any) -> Iterator[str]:
    """All texts under `data_files` and `data_dir` of the configurations, whatever their form."""
    configs = fields.get("configs") if isinstance(fields, dict) else None
    for config in configs if isinstance(configs, list) else ():
        places = [config.get("data_files"), config.get("data_dir")] if isinstance(config, dict) else []
        while places:
            place = places.pop()
            if isinstance(place, str):
                yield place
            elif isinstance(place, (dict, list)):
                places.extend(place.values() if isinstance(place, dict) else place)
