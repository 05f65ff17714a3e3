"""Where records come from: data files, and folders, files and Hub repositories of `datasets`.

Pictures stay encoded until somebody loads them with the limits of `image_loading`; `datasets` itself would decode
them without. JSON files are read here and not by `datasets`, which wants one type for each key: LLaVA's own files mix
numbers and texts in `id`, and one and many in `image`.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .image_folders import ImageFolder
from .record_files import stream_records

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_JSON = (".json", ".jsonl")
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
ROW_FILES = (*_JSON, *_BUILDERS)
"""Endings of files that hold rows; pictures lie beside them."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Rows from one place.

    Raises:
        ValueError: a weight that is not positive, or a `shuffle_buffer` that is, or has, nothing to draw from.
    """

    path: str
    """A file `.json`, `.jsonl`, `.parquet` or `.arrow`; a folder of them or of `save_to_disk`; or a Hub dataset id."""
    image_folder: str | None = None
    """Where image paths start, and where they have to stay; without it, records with paths are refused."""
    follow_links: bool = False
    """Symbolic links in the image folder may lead out of it."""
    name: str | None = None
    """Configuration of a Hub dataset."""
    split: str = "train"
    """Of a dataset that has several."""
    streaming: bool = False
    """Read while training, without a copy on disk, in the order of the files."""
    shuffle_buffer: int | None = None
    """Of a source that is streaming: each row is drawn from the next so many, by the seed."""
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
    files = find_json_files(source)
    if files:
        return sum(1 for _ in stream_files(files)), stream_files(files)
    dataset = open_dataset(source)
    return (None if source.streaming else len(dataset)), _iterate(dataset, source)


def find_json_files(source: DataSource) -> tuple[str, ...]:
    """The files of a source that holds JSON alone; none of another one.

    Raises:
        ValueError: there is no such configuration.
    """
    path = Path(source.path)
    if path.suffix in _JSON:
        return (source.path,)
    if not path.is_dir() or _is_saved_dataset(path):
        return ()

    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    try:
        # `datasets` tells by their names which files are of the split.
        splits = load_dataset_builder(source.path, source.name).config.data_files or {}
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise _unreadable(source, error) from error
    files = tuple(splits.get(source.split, ()))
    return files if all(Path(file).suffix in _JSON for file in files) else ()


def stream_files(files: Iterable[str]) -> Iterator[Any]:
    """The records of JSON files, one file after the other; see `stream_records`."""
    return chain.from_iterable(map(stream_records, files))


def open_dataset(source: DataSource) -> "Dataset | IterableDataset":
    """What `datasets` knows of a source, with undecoded pictures.

    Raises:
        ValueError: there is no such dataset, split or configuration, or it cannot be read.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    path = Path(source.path)
    if path.is_file() and path.suffix not in _BUILDERS:
        raise ValueError(
            f"got the data {source.path!r}; expected a file that ends in {', '.join(ROW_FILES)}: write its rows as "
            "JSON, as README.md does with those of a CSV file"
        )
    options = {"split": source.split, "streaming": source.streaming}
    try:
        if _is_saved_dataset(path):
            dataset = load_from_disk(source.path)
            dataset = dataset[source.split] if isinstance(dataset, DatasetDict) else dataset
            dataset = dataset.to_iterable_dataset() if source.streaming else dataset
        elif path.suffix in _BUILDERS:
            dataset = load_dataset(_BUILDERS[path.suffix], data_files=source.path, **options)
        else:
            dataset = load_dataset(source.path, source.name, **options)
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise _unreadable(source, error) from error
    for name, feature in (dataset.features or {}).items():
        encoded = _leave_encoded(feature)
        if encoded != feature:
            dataset = dataset.cast_column(name, encoded)
    return dataset


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _leave_encoded(feature: Any) -> Any:
    """The type of a column, with pictures undecoded however deep they lie."""
    from datasets import Image, LargeList, List

    if isinstance(feature, Image):
        return Image(decode=False)
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

    # It says only that there was an error; classes of it say which.
    if type(error) is DatasetGenerationError:
        error = error.__cause__ or error
    return ValueError(
        f"got the data {source.path!r}, split {source.split!r} ({type(error).__name__}: {error}); expected a JSON "
        "file, a folder or file of datasets, or a Hub dataset; correct path, name and split"
    )
