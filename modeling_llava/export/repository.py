"""`llava export`: a folder as it goes to the Hub, for a model, an adapter, a dataset or a Space.

Each kind of repository has a file beside this one, which writes it and finds what is wrong with it; `KINDS` names
them. What every kind is checked for stands in `repository_check.py`. A folder that this file returns was checked.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from processing_llava.data.data_sources import ROW_FILES
from processing_llava.original.file_checks import read_json
from processing_llava.original.original_folder import find_layout

from .adapter_repository import find_adapter_problems, write_adapter_repository
from .dataset_repository import find_dataset_problems, write_dataset_repository
from .export_settings import Exported, ExportSettings
from .model_card import PREPARED_MARK
from .model_repository import find_model_problems, list_replaced_files, write_model_repository
from .repository_check import clean_images_in_files, find_card_problems, find_file_problems, read_card
from .space_repository import find_space_problems, write_space_repository

_PREPARED = re.compile(rf"{re.escape(PREPARED_MARK)} .* for (\S+) -->")
IGNORED_FOLDERS = ("__pycache__", ".cache", ".git")
"""What no repository holds."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How one kind of repository is written, checked and updated."""

    repo_type: str
    """"model", "dataset" or "space", as the Hub has it."""
    write: Callable[[Path, Path, ExportSettings], Exported]
    find_problems: Callable[[Path, dict[str, Any] | None], Iterator[str]]
    """It takes the folder and the metadata of its card, None where there are none that can be read."""
    list_replaced: Callable[[], list[str]]
    """Patterns of files that an earlier push may have left, and that would be read beside those that go up."""


KINDS = {
    "model": Kind(
        repo_type="model",
        write=write_model_repository,
        find_problems=find_model_problems,
        list_replaced=list_replaced_files,
    ),
    "adapter": Kind(
        repo_type="model",
        write=write_adapter_repository,
        find_problems=find_adapter_problems,
        list_replaced=list_replaced_files,
    ),
    "dataset": Kind(
        repo_type="dataset",
        write=write_dataset_repository,
        find_problems=find_dataset_problems,
        list_replaced=lambda: ["data/train-*"],
    ),
    "space": Kind(
        repo_type="space",
        write=write_space_repository,
        find_problems=find_space_problems,
        list_replaced=lambda: [],
    ),
}
"""What can be exported."""


def prepare_repository(source: Path, out: Path, settings: ExportSettings) -> Exported:
    """A prepared folder as it is, once it is checked; of anything else an export to `out`.

    Raises:
        ValueError: as `export_repository`, or if the folder was prepared for another repository.
    """
    prepared_id = find_prepared_id(source)
    if prepared_id is None:
        return export_repository(source, out, settings)
    if settings != ExportSettings(repo_id=settings.repo_id):
        raise ValueError(f"got {source}, which is exported already, and settings of an export; expected one of them")
    if prepared_id != settings.repo_id:
        raise ValueError(
            f"got {source}, whose card was written for {prepared_id!r}; expected {settings.repo_id!r}: export it "
            f"again with --repo-id {settings.repo_id}"
        )
    kind = find_kind(source)
    check_repository(source, kind)
    return Exported(folder=source, kind=kind)


def find_prepared_id(source: Path) -> str | None:
    """The repository that `llava export` wrote a folder for; None for any other folder or file."""
    card = source / "README.md"
    mark = _PREPARED.search(card.read_text(encoding="utf-8")) if card.is_file() else None
    return mark.group(1) if mark else None


def export_repository(source: Path, out: Path, settings: ExportSettings) -> Exported:
    """Write a folder for the Hub, and check it.

    Args:
        source: Folder of a model, adapter or Space; folder or file of data.
        out: Folder to write; must be new or empty. Nothing of it stays if something is wrong.

    Raises:
        ValueError: if something is missing, cannot be expressed, or may not go up.
    """
    kind = find_kind(source)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"got {out}, which holds files; expected a new or empty folder")
    if kind != "model" and (settings.layout is not None or settings.with_code):
        raise ValueError(f"got a layout or code for a {kind}; expected them for a model only")
    settings = replace(settings, repo_id=settings.repo_id or out.name)
    out.mkdir(parents=True, exist_ok=True)
    try:
        exported = KINDS[kind].write(source, out, settings)
        clean_images_in_files(out)
        check_repository(out, kind)
    except BaseException:
        shutil.rmtree(out)
        raise
    return exported


def find_kind(source: Path) -> str:
    """What a path holds: a key of `KINDS`.

    Raises:
        ValueError: if it is none of them.
    """
    if source.is_file() and source.suffix in ROW_FILES:
        return "dataset"
    if not source.is_dir():
        raise ValueError(f"got {str(source)!r}; expected a folder, or a file of rows: there is none at this path")
    card, config = source / "README.md", source / "config.json"
    if card.is_file() and re.search(r"^sdk:", card.read_text(encoding="utf-8"), flags=re.MULTILINE):
        return "space"
    if (source / "adapter_config.json").is_file():
        # A LoRA of the original LLaVA has a config.json too, and goes up merged.
        is_merged = config.is_file() and find_layout(read_json(str(source), "config.json", {})) == "original"
        return "model" if is_merged else "adapter"
    if config.is_file():
        return "model"
    if (source / "app.py").is_file():
        return "space"
    if any(path.suffix in ROW_FILES for path in source.rglob("*")):
        return "dataset"
    raise ValueError(
        f"got {str(source)!r}; expected a model (config.json), an adapter (adapter_config.json), a Space (app.py) or "
        "data (JSON, Parquet or Arrow files)"
    )


def list_files(folder: Path) -> dict[str, int]:
    """Sizes in bytes of the files that would go up, by their path in the repository."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in paths
        if not set(IGNORED_FOLDERS) & set(path.relative_to(folder).parts)
    }


def check_repository(folder: Path, kind: str) -> None:
    """Refuse a folder that may not go up.

    Args:
        kind: A key of `KINDS`.

    Raises:
        ValueError: with every reason.
    """
    problems = list(find_problems(folder, kind))
    if problems:
        raise ValueError(f"got {folder}, which may not go up: {'; '.join(problems)}; correct that first")


def find_problems(folder: Path, kind: str) -> Iterator[str]:
    """Every reason why a folder may not go up."""
    card = read_card(folder)
    yield from find_file_problems(folder)
    yield from KINDS[kind].find_problems(folder, card.metadata)
    yield from find_card_problems(folder, card)
