"""`llava export`: a folder as it goes to the Hub, for a model, an adapter, a dataset or a Space."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

from processing_llava.data.data_sources import ROW_FILES, DataSource
from processing_llava.original.original_folder import find_layout

from .export_settings import Exported, ExportSettings
from .model_card import PREPARED_MARK
from .repository_check import check_repository

KINDS = {"model": "model", "adapter": "model", "dataset": "dataset", "space": "space"}
"""What can be exported, and as which type of repository."""
_PREPARED = re.compile(rf"{re.escape(PREPARED_MARK)} .* for (\S+) -->")
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.pyc", ".git", ".gradio", ".cache", ".env")


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
        is_merged = config.is_file() and find_layout(json.loads(config.read_text(encoding="utf-8"))) == "original"
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


def find_prepared_id(source: Path) -> str | None:
    """The repository that `llava export` wrote a folder for; None for any other folder or file."""
    card = source / "README.md"
    mark = _PREPARED.search(card.read_text(encoding="utf-8")) if card.is_file() else None
    return mark.group(1) if mark else None


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
        exported = _export(kind, source, out, settings)
        check_repository(out, kind)
    except BaseException:
        shutil.rmtree(out)
        raise
    return exported


def _export(kind: str, source: Path, out: Path, settings: ExportSettings) -> Exported:
    if kind == "dataset":
        return _export_dataset(source, out, settings)
    if kind == "space":
        return _export_space(source, out, settings)
    from .model_repository import export_adapter, export_model

    return (export_model if kind == "model" else export_adapter)(source, out, settings)


def _export_dataset(source: Path, out: Path, settings: ExportSettings) -> Exported:
    from .dataset_repository import write_dataset_repository

    notices = write_dataset_repository(
        DataSource(path=str(source), image_folder=settings.image_folder),
        out,
        facts=settings.facts,
        data=settings.data or settings.facts.data_entries,
        repo_id=settings.repo_id,
    )
    return Exported(folder=out, kind="dataset", notices=notices)


def _export_space(source: Path, out: Path, settings: ExportSettings) -> Exported:
    from .model_card import write_space_card
    from .space_package import carry_package

    shutil.copytree(source, out, dirs_exist_ok=True, ignore=_NOT_COPIED)
    if not (out / "README.md").is_file():
        write_space_card(out, facts=settings.facts, repo_id=settings.repo_id)
    return Exported(folder=out, kind="space", notices=carry_package(out))
