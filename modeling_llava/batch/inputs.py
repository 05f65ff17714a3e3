"""What a batch is asked about: pictures of a folder, or rows of JSON, CSV, Parquet or `datasets`, one at a time.

Every row has a key that stays the same the next time: its own, the path from the folder, or its number in the file.
What is wrong with one row is that row's own error; what is wrong with the source ends the run.

What is surprising: pictures are named by rows of somebody else's file, so paths stay in the folder of the file, and
links of a folder inside of it, unless `follow_links` says otherwise (`processing_llava.data.data_sources`).
"""

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from transformers.utils import logging

from processing_llava.data.conversations import convert_record
from processing_llava.data.data_bounds import RefusedRecord, bound_record
from processing_llava.data.data_sources import ROW_FILES, DataSource, ImageFolder, open_records
from processing_llava.data.json_records import stream_records
from processing_llava.messages import is_missing

logger = logging.get_logger(__name__)

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
OTHER_PICTURES = (".avif", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".pdf", ".psd", ".svg", ".tif", ".tiff")
"""Pictures to their owners, too: a row with an error says what to do with each."""
KEYS = ("key", "id", "question_id")
IMAGES = ("image", "images", "file_name", "path")
QUESTION = "question"
"""Columns that are looked for where no option names one."""
_JSON = (".json", ".jsonl")
_CSV = (".csv", ".tsv")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class BatchInput:
    """Where rows come from."""

    path: str
    image_folder: str | None = None
    """Where paths of pictures start, and where they have to stay; by default the folder, or that of the file."""
    follow_links: bool = False
    key_column: str | None = None
    image_column: str | None = None
    question_column: str | None = None
    """Columns of rows; None for those of `KEYS`, `IMAGES` and `QUESTION`."""
    asks: bool = False
    """Rows bring their own questions."""
    name: str | None = None
    split: str = "train"
    streaming: bool = False
    """As those of `DataSource`."""

    @property
    def images(self) -> ImageFolder | None:
        """Where rows may have their pictures."""
        if self.image_folder is not None:
            return ImageFolder(self.image_folder, follow_links=self.follow_links)
        path = Path(self.path)
        if not path.exists():
            return None
        return ImageFolder(path if path.is_dir() else path.parent, follow_links=self.follow_links)


@dataclass(frozen=True)
class InputRow:
    """One row, whose pictures are not read yet."""

    key: str
    pictures: Any
    """What `convert_record` takes as `image`, or the `RefusedRecord` that this row is."""
    question: Any
    folder: ImageFolder | None

    @property
    def image(self) -> str | list[str] | None:
        """What names the pictures in a file of answers; None of those without a name."""
        pictures = self.pictures if isinstance(self.pictures, list) else [self.pictures]
        names = [_name_picture(picture) for picture in pictures]
        return names[0] if len(names) == 1 else names

    def list_pictures(self) -> list[Any]:
        """The pictures as `load_image` takes them.

        Raises:
            ValueError: if there is none, or one that is not allowed.
        """
        if isinstance(self.pictures, RefusedRecord):
            raise self.pictures
        turns = [{"role": "user", "content": ""}]
        row = convert_record({"id": self.key, "image": self.pictures, "messages": turns}, 0, image_folder=self.folder)
        if not row["images"]:
            raise ValueError("got no picture; expected one in each row; add it or take the row out")
        return row["images"]


def open_rows(source: BatchInput) -> Iterator[InputRow]:
    """The rows of a source, in their order.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it cannot be read, has no row, two rows of one key, or other columns than were named; some of it
            when the row is reached.
    """
    path = Path(source.path)
    kind = path.suffix.lower()
    is_folder = path.is_dir() and not _holds_data(path)
    if is_folder or kind in (*_JSON, *_CSV):
        for option, value in {"--name": source.name, "--streaming": source.streaming or None}.items():
            if value is not None or source.split != "train":
                raise ValueError(f"got {option} or --split for {source.path!r}, which has none; take it out")
    if is_folder:
        if source.asks:
            raise ValueError(f"got no question about {source.path!r}; expected --question, --questions or --task")
        names = _walk(path, source.follow_links)
        return _refuse_repeated((InputRow(clean(name), name, None, source.images) for name in names), source)
    if not path.exists() and (kind in (*_CSV, *ROW_FILES) or not _HUB_NAME.fullmatch(source.path)):
        raise FileNotFoundError(
            f"got the input {source.path!r}, which is not there; expected a folder of pictures, a file "
            f"({', '.join((*_CSV, *ROW_FILES))}), or the name of a Hub dataset; correct it"
        )
    if path.is_file() and kind not in (*_CSV, *ROW_FILES):
        raise ValueError(
            f"got the input {source.path!r}; expected a folder of pictures, or a file that ends in "
            f"{', '.join((*_CSV, *ROW_FILES))}: one picture is asked about with llava ask"
        )
    if kind in _JSON:
        records = _read_json(path)
    elif kind in _CSV:
        records = _read_csv(path)
    else:
        # Files of this machine are read where they are, without a copy in the cache of datasets.
        streaming = source.streaming or kind == ".parquet"
        _, records = open_records(
            DataSource(path=source.path, name=source.name, split=source.split, streaming=streaming)
        )
    return _refuse_repeated(_convert(records, source), source)


def _refuse_repeated(rows: Iterable[InputRow], source: BatchInput) -> Iterator[InputRow]:
    """The same rows; two of one key could not both be found in a file of answers.

    Raises:
        ValueError: naming the second of them; there is no row.
    """
    seen: set[bytes] = set()
    for number, row in enumerate(rows, start=1):
        digest = hashlib.blake2b(row.key.encode(), digest_size=12).digest()
        if digest in seen:
            raise ValueError(
                f"got the key {row.key[:80]!r} again in row {number} of {source.path}; expected another one in each "
                "row: correct it, or choose another column with --key-column"
            )
        seen.add(digest)
        yield row
    if not seen:
        raise ValueError(
            f"got {source.path!r} without a row; expected rows, or pictures ({', '.join(PICTURES)}); correct it"
        )


def clean(text: str) -> str:
    """A text whose halves of surrogate pairs, of file names that are no Unicode, are written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _name_picture(picture: Any) -> str | None:
    if isinstance(picture, dict):
        picture = picture.get("path")
    if not isinstance(picture, str):
        return None
    return "data URI" if picture[:5].lower() == "data:" else clean(picture)


# Folders.


def _holds_data(folder: Path) -> bool:
    """Whether a folder is one of `datasets`, not of pictures."""
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return True
    names = [name for _, _, names in os.walk(folder, onerror=_fail) for name in names]
    endings = {os.path.splitext(name)[1].lower() for name in names}
    return bool(endings & {".parquet", ".arrow", *_JSON}) and not endings & {*PICTURES, *OTHER_PICTURES}


def _walk(folder: Path, follow_links: bool) -> Iterator[str]:
    """Names of the pictures of a folder, from there, in the order of their names; one line says what is left out."""
    left_out: Counter[str] = Counter()
    for place, folders, names in os.walk(folder, onerror=_fail, followlinks=follow_links):
        if follow_links and _leads_back(place):
            left_out["links to a folder above"] += 1
            folders.clear()
            continue
        hidden = [name for name in folders if name.startswith(".")]
        linked = [name for name in folders if not follow_links and os.path.islink(os.path.join(place, name))]
        left_out.update({"folders that begin with a dot": len(hidden), "links to folders": len(linked)})
        folders[:] = sorted(name for name in folders if name not in hidden)
        for name in sorted(names):
            ending = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                left_out["files that begin with a dot"] += 1
            elif ending in (*PICTURES, *OTHER_PICTURES):
                yield os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")
            else:
                left_out[f"files {ending}" if ending else "files without an ending"] += 1
    if +left_out:
        what = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common() if count)
        logger.warning_once(f"{folder}: left out is what is no picture by its name: {what}")


def _fail(error: OSError) -> None:
    """For `os.walk`, which otherwise leaves out folders that it may not read."""
    raise error


def _leads_back(place: str) -> bool:
    """Whether a link leads to a folder above itself, which would never end."""
    real = os.path.realpath(place)
    return any(os.path.realpath(parent) == real for parent in Path(os.path.abspath(place)).parents)


# Files of rows.


def _read_json(path: Path) -> Iterator[Any]:
    for number, record in enumerate(stream_records(path, keys=frozenset()), start=1):
        yield bound_record(record, f"row {number}")


def _read_csv(path: Path) -> Iterator[Any]:
    """Rows by the names of their columns, between commas, semicolons or tabs as the first line has them."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = None
        try:
            first = file.readline()
            file.seek(0)
            rows = csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True)
            columns = next(rows, [])
            if len(set(columns)) < len(columns):
                raise ValueError(f"got {path}, whose first line has a column twice; expected names; correct it")
            for values in filter(None, rows):
                if len(values) == len(columns):
                    yield dict(zip(columns, values))
                    continue
                got = f"{len(values)} values for {len(columns)} columns"
                name = f"{path.name}, line {rows.line_num}"
                yield RefusedRecord(name, "columns", got, "expected one for each; correct the line")
        except csv.Error as error:
            raise ValueError(
                f"got {path}, line {rows.line_num} ({error}); expected CSV; correct the line, such as its quotes"
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"got {path}, which is not UTF-8 ({error}); expected text; save it as UTF-8") from error


def _convert(records: Iterable[Any], source: BatchInput) -> Iterator[InputRow]:
    """Rows of records, whose columns are those of the options or the usual ones."""
    records = iter(records)
    beginning = list(islice(records, 1))
    if beginning and isinstance(beginning[0], dict):
        _check_columns(beginning[0], source)
    folder = source.images
    for number, record in enumerate(chain(beginning, records), start=1):
        if isinstance(record, RefusedRecord):
            yield InputRow(clean(record.record_id), record, None, folder)
            continue
        if not isinstance(record, dict):
            refused = RefusedRecord(f"row {number}", "no record", repr(record)[:80], "expected an object; correct it")
            yield InputRow(f"row {number}", refused, None, folder)
            continue
        key = _find(record, source.key_column, KEYS)
        key = f"row {number}" if is_missing(key) else clean(str(key))
        yield InputRow(
            key,
            _find(record, source.image_column, IMAGES),
            _find(record, source.question_column, (QUESTION,)),
            folder,
        )


def _find(record: dict[str, Any], column: str | None, usual: tuple[str, ...]) -> Any:
    if column is not None:
        return record.get(column)
    return next((record[name] for name in usual if name in record), None)


def _check_columns(record: dict[str, Any], source: BatchInput) -> None:
    """Refuse a source whose first row has none of the columns: every other one would be an error like it."""
    asked = {"--key-column": source.key_column, "--question-column": source.question_column}
    asked = {option: (column,) for option, column in asked.items() if column is not None}
    if source.asks and source.question_column is None:
        asked["--question-column (or --question, --task)"] = (QUESTION,)
    elif not source.asks and QUESTION in record:
        logger.warning_once(f"{source.path}: the column {QUESTION!r} is not used, since all rows are asked the same")
    asked["--image-column"] = IMAGES if source.image_column is None else (source.image_column,)
    for option, columns in asked.items():
        if not any(column in record for column in columns):
            found = ", ".join(repr(str(column)[:40]) for column in list(record)[:20])
            raise ValueError(
                f"got {source.path} with the columns {found}; expected {' or '.join(columns)}; name another one with "
                f"{option}"
            )
