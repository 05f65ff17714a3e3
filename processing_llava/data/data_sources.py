"""Where records come from: JSON files (`json_records.py`), and what `datasets` reads.

Pictures stay encoded until they are loaded with the limits of `image_loading`; `datasets` decodes them without
(datasets 5.2, features/image.py). Names of pictures lead to files of their folder alone: a record of somebody else's
data can name any file of the machine that trains on it, and a model that learned a file can tell what was in it.
"""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from processing_llava.image_limits import ImageLimits

from .data_bounds import bound_record, check_card, check_inside, check_parquet, check_saved
from .json_records import stream_records

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

_JSON = (".json", ".jsonl")
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
ROW_FILES = (*_JSON, *_BUILDERS)
"""Endings of files that hold rows; pictures lie beside them."""

PICTURE_LIMITS = ImageLimits(max_bytes=50_000_000, max_memory=400_000_000, max_milliseconds=2000)
"""What pictures may cost whose owner chose them; a run that stops at one costs more."""


@dataclass(frozen=True)
class ImageFolder:
    """Where image paths start, and where they have to stay."""

    path: str | Path
    follow_links: bool = False
    """Symbolic links in it may lead out of it."""

    def find(self, name: str) -> Path:
        """The path of an image, which need not exist.

        Args:
            name: Relative to the folder, or absolute.

        Raises:
            ValueError: it leads out of the folder, or cannot be a path.
        """
        resolve = os.path.abspath if self.follow_links else os.path.realpath
        try:
            root = resolve(self.path)
            found = resolve(os.path.join(root, name))
        except (OSError, ValueError) as error:
            raise ValueError(f"got the image path {name[:80]!r} ({error}); expected a file; correct it") from None
        if os.path.commonpath([root, found]) != root:
            raise ValueError(
                f"got the image path {name[:80]!r}, which leads to {found[:200]}; expected a file in {root}; correct "
                "it, choose another image_folder, or allow links that you made yourself (follow_links, --follow-links)"
            )
        return Path(found)


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Rows from one place.

    Raises:
        ValueError: a weight or `shuffle_buffer` that is not positive, a buffer for rows that are not streaming, a
            split that is none, or `follow_links` without a folder.
    """

    path: str
    """A file `.json`, `.jsonl`, `.parquet` or `.arrow`; a folder of them or of `save_to_disk`; or a Hub dataset id."""
    image_folder: str | None = None
    """Where image paths start, and where they have to stay; without it, records with paths are refused."""
    follow_links: bool = False
    """Symbolic links in the image folder, and in a folder of data, may lead out of it."""
    name: str | None = None
    """Configuration of a Hub dataset, or of a folder that names some in its README.md; other data has none."""
    split: str = "train"
    """Split of a dataset, in the words of `datasets`: "validation", "train[:75%]", "train[:10]+test". A file, and a
    dataset that was saved alone, are a "train"; a part of what is streaming can be read of JSON only."""
    streaming: bool = False
    """Read while training, without a copy on disk, in the order of the files."""
    shuffle_buffer: int | None = None
    """Rows of a streaming source among which the next one is sampled, by the seed."""
    weight: float | None = None
    """Share of a mixture, as a ratio to the other weights; for all sources or none."""

    def __post_init__(self) -> None:
        if self.weight is not None and not (0 < self.weight < math.inf):
            raise ValueError(f"got weight={self.weight} for {self.path}; expected a positive number; correct it")
        if self.shuffle_buffer is not None and not (self.streaming and self.shuffle_buffer > 0):
            raise ValueError(
                f"got shuffle_buffer={self.shuffle_buffer} for {self.path} with streaming={self.streaming}; expected "
                "a positive number, and streaming: true: other rows are shuffled as a whole"
            )
        if not isinstance(self.split, str) or not self.split:
            raise ValueError(f"got split={self.split!r} for {self.path}; expected a name, such as 'train[:75%]'")
        if self.follow_links and self.image_folder is None and not Path(self.path).is_dir():
            raise ValueError(
                f"got follow_links for {self.path} without an image_folder; expected one, or a folder of data"
            )

    @property
    def images(self) -> ImageFolder | None:
        """Where records may have their images."""
        return None if self.image_folder is None else ImageFolder(self.image_folder, follow_links=self.follow_links)


def open_records(source: DataSource) -> tuple[int | None, Iterator[Any]]:
    """How many records a source has, if that can be known beforehand, and the records for `convert_record`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such dataset, split or configuration, or it cannot be read.
    """
    parts = find_json_parts(source)
    if parts:
        return sum(1 for _ in stream_parts(parts)), _bound_records(stream_parts(parts))
    dataset = open_dataset(source)
    return (None if source.streaming else len(dataset)), _bound_records(_iterate(dataset, source))


JsonParts = tuple[tuple[tuple[str, ...], int, int | None], ...]
"""Files that are read one after the other, and the first record of them and the one behind the last."""


def find_json_parts(source: DataSource) -> JsonParts:
    """The parts of JSON files that a source is; none of one that is no JSON.

    Raises:
        FileNotFoundError: there is no such file, or image folder.
        ValueError: there is no such configuration, split, or part of one.
    """
    _check_places(source)
    path = Path(source.path)
    if path.suffix in _JSON:
        splits = {"train": (source.path,)}
    elif _is_saved_dataset(path):
        check_saved(path, follow_links=source.follow_links)
        return ()
    elif not path.is_dir():
        if path.suffix == ".parquet" and path.is_file():
            check_parquet(path)
        return ()
    else:
        check_card(path)
        splits = _find_split_files(source)
        files = [file for files in splits.values() for file in files]
        check_inside(path, files, by="README.md", follow_links=source.follow_links)
        for file in files:
            if file.endswith(".parquet"):
                check_parquet(file)
        if any(Path(file).suffix not in _JSON for files in splits.values() for file in files):
            return ()
    if source.split in splits:
        return ((splits[source.split], 0, None),)
    lengths = {name: sum(1 for _ in _stream_files(files)) for name, files in splits.items()}
    return tuple((splits[name], start, stop) for name, start, stop in _read_split(source, lengths))


def stream_parts(parts: JsonParts) -> Iterator[Any]:
    """The records of parts, one after the other; see `stream_records`."""
    return chain.from_iterable(islice(_stream_files(files), start, stop) for files, start, stop in parts)


def open_dataset(source: DataSource) -> "Dataset | IterableDataset":
    """What `datasets` knows of a source, with undecoded pictures.

    Raises:
        ValueError: there is no such dataset, split or configuration, it cannot be read, or is empty.
    """
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    path = Path(source.path)
    if path.is_file() and path.suffix not in _BUILDERS:
        raise ValueError(
            f"got the data {source.path!r}; expected a file that ends in {', '.join(ROW_FILES)}: write its rows as "
            "JSON, as README.md does with those of a CSV file"
        )
    if source.streaming and not _is_saved_dataset(path) and not re.fullmatch(r"\w+(\.\w+)*", source.split):
        raise ValueError(
            f"got split {source.split!r} of {source.path!r} with streaming: true; expected a whole split, since rows "
            "of a stream are not counted; take streaming out"
        )
    options = {"split": source.split, "streaming": source.streaming}
    try:
        if _is_saved_dataset(path):
            dataset = _select(load_from_disk(source.path), source)
            dataset = dataset.to_iterable_dataset() if source.streaming else dataset
        elif path.suffix in _BUILDERS:
            dataset = load_dataset(_BUILDERS[path.suffix], data_files=source.path, **options)
        else:
            if not path.exists():
                _check_hub_files(source)
            dataset = load_dataset(source.path, source.name, **options)
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise _unreadable(source, error) from error
    if not source.streaming and not len(dataset):
        raise ValueError(f"got no records in split {source.split!r} of {source.path!r}; expected at least one")
    for name, feature in (dataset.features or {}).items():
        encoded = _leave_encoded(feature)
        if encoded != feature:
            dataset = dataset.cast_column(name, encoded)
    return dataset


def _stream_files(files: tuple[str, ...]) -> Iterator[Any]:
    return chain.from_iterable(map(stream_records, files))


def _check_places(source: DataSource) -> None:
    path = Path(source.path)
    if source.image_folder is not None and not Path(source.image_folder).is_dir():
        raise FileNotFoundError(
            f"got the image_folder {source.image_folder!r} for {source.path}; expected a folder; correct it"
        )
    is_alone = path.suffix in ROW_FILES or _is_saved_dataset(path)
    if source.name is not None and is_alone:
        raise ValueError(
            f"got name={source.name!r} for {source.path!r}, which has no configurations; expected none; take it out"
        )


def _check_hub_files(source: DataSource) -> None:
    """Refuse a Hub dataset whose card names files of this machine, or other places on the network."""
    files = [file for files in _find_split_files(source).values() for file in files]
    for file in files:
        if not file.startswith("hf://"):
            raise ValueError(
                f"got the dataset {source.path!r}, whose card names the data {file[:80]!r}; expected files of its "
                "repository; take another dataset"
            )


def _find_split_files(source: DataSource) -> dict[str, tuple[str, ...]]:
    """The files of each split of a folder or Hub dataset, told by their names (datasets 5.2, data_files.py)."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    try:
        splits = load_dataset_builder(source.path, source.name).config.data_files or {}
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise _unreadable(source, error) from error
    return {str(name): tuple(files) for name, files in splits.items()}


def _read_split(source: DataSource, lengths: dict[str, int]) -> list[tuple[str, int, int]]:
    """Name, first row, and row behind the last, of each part of a split.

    Args:
        lengths: How many rows each split has.

    Raises:
        ValueError: there is no such split, or no row in this part of it.
    """
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(source.split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise _unreadable(source, error) from error
    ranges = [(part.splitname, part.from_, part.to) for part in parts]
    if all(start >= stop for _, start, stop in ranges):
        raise ValueError(
            f"got no row in split {source.split!r} of {source.path!r}, which has {lengths}; expected at least one"
        )
    return [(name, start, stop) for name, start, stop in ranges if start < stop]


def _select(dataset: "Dataset | DatasetDict", source: DataSource) -> "Dataset":
    """The split of a saved dataset; one that was saved alone may know its own name too."""
    from datasets import DatasetDict, concatenate_datasets

    splits = dataset if isinstance(dataset, DatasetDict) else {"train": dataset, str(dataset.split): dataset}
    ranges = _read_split(source, {str(name): len(rows) for name, rows in splits.items()})
    return concatenate_datasets([splits[name].select(range(start, stop)) for name, start, stop in ranges])


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _leave_encoded(feature: Any) -> Any:
    """The type of a column, with pictures and all that names a file undecoded, however deep they lie."""
    from datasets import LargeList, List

    if is_dataclass(feature) and "decode" in {item.name for item in fields(feature)}:
        return replace(feature, decode=False)
    if isinstance(feature, dict):
        return {name: _leave_encoded(part) for name, part in feature.items()}
    if isinstance(feature, (List, LargeList)):
        return replace(feature, feature=_leave_encoded(feature.feature))
    return feature


def _iterate(dataset: "Dataset | IterableDataset", source: DataSource) -> Iterator[Any]:
    from datasets.exceptions import DatasetsError

    try:
        yield from dataset
    except (OSError, DatasetsError) as error:
        raise _unreadable(source, error) from error


def _unreadable(source: DataSource, error: Exception) -> ValueError:
    from datasets.exceptions import DatasetGenerationError

    # This class says only that there was an error, and its subclasses which (datasets 5.2, builder.py).
    if type(error) is DatasetGenerationError:
        error = error.__cause__ or error
    return ValueError(
        f"got the data {source.path!r}, split {source.split!r} ({type(error).__name__}: {error}); expected a JSON "
        "file, a folder or file of datasets, or a Hub dataset; correct path, name and split"
    )


def _bound_records(records: Iterator[Any]) -> Iterator[Any]:
    """The same records, with a `RefusedRecord` in place of one that is too much."""
    for number, record in enumerate(records, start=1):
        yield bound_record(record, f"record {number}")
