"""Rows of training data as a dataset repository: Parquet files with the pictures inside, and a card."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from modeling_llava.records.figures import add_source, build_environment
from modeling_llava.records.training_record import DATA_KINDS, NOT_STATED
from processing_llava.data.data_sources import DataSource

from .export_settings import Exported, ExportSettings
from .model_card import assemble_card
from .repository_check import Part, find_conflicts, find_language_problems

SHARD_BYTES = 500_000_000
"""About the size of one Parquet file."""
SIZE_CATEGORIES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
)
"""Number of rows below which a category of the Hub ends, and its name."""


def write_dataset_repository(source: Path, out: Path, settings: ExportSettings) -> Exported:
    """Write `data/train-*.parquet` and README.md.

    Raises:
        ValueError: if a record or picture cannot be read, or the licence is missing.
    """
    facts = settings.facts
    data = settings.data or facts.data_entries
    license_id = facts.require_license()
    counts = write_parquet(DataSource(path=str(source), image_folder=settings.image_folder), out / "data")
    parts = [Part(name=entry.name, kind="data", license=entry.license) for entry in data]
    conflicts = find_conflicts(license_id, parts)
    title = facts.choose_title(settings.repo_id)
    body = (
        build_environment()
        .get_template("dataset.md.jinja")
        .render(
            title=title,
            repo_id=settings.repo_id,
            facts=facts,
            data=data,
            kinds=DATA_KINDS,
            not_stated=NOT_STATED,
            conflicts=conflicts,
            num_rows=counts["rows"],
            num_images=counts["images"],
        )
    )
    size = next((name for end, name in SIZE_CATEGORIES if counts["rows"] < end), "n>1T")
    metadata = DatasetCardData(
        license=license_id,
        license_name=facts.license_name,
        license_link=facts.license_link,
        language=facts.language,
        pretty_name=title,
        task_categories=["image-text-to-text", "visual-question-answering"],
        size_categories=[size],
        tags=["llava", *facts.tags],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    )
    card = assemble_card(metadata, body, layout="dataset", repo_id=settings.repo_id)
    (out / "README.md").write_text(card, encoding="utf-8")
    return Exported(folder=out, kind="dataset", notices=conflicts)


def find_dataset_problems(folder: Path, metadata: dict[str, Any] | None) -> Iterator[str]:
    """Languages that are none, and files that the card names and the folder lacks."""
    if metadata is None:
        return
    yield from find_language_problems(metadata)
    for config in metadata.get("configs") or []:
        for files in config["data_files"]:
            if not any(folder.glob(files["path"])):
                yield f"configs names {files['path']}, and there is no such file"


def write_parquet(source: DataSource, folder: Path) -> dict[str, int]:
    """Write the rows with their pictures' bytes, without metadata; returns how many rows and pictures there are.

    Raises:
        ValueError: if a record or picture cannot be read.
    """
    from datasets import Features, Image, List

    from processing_llava.data.row_datasets import ROW_FEATURES, load_rows

    rows, _ = load_rows([source])
    features = Features(ROW_FEATURES | {"images": List(Image())})
    table = rows.map(_clean_images, batched=True, batch_size=100, features=features).with_format("arrow")
    num_shards = 1 + table.data.nbytes // SHARD_BYTES
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num_shards):
        shard = table.shard(num_shards, index, contiguous=True).with_format(None)
        shard.to_parquet(folder / f"train-{index:05}-of-{num_shards:05}.parquet")
    num_images = sum(len(images) for images in rows.with_format(None)["images"])
    return add_source({"rows": len(rows), "images": num_images}, "data")


def _clean_images(batch: dict[str, list]) -> dict[str, list]:
    """Paths in, bytes out: what leaves this machine holds its pictures, and nothing of where they were taken."""
    rows = zip(batch["id"], batch["images"])
    return {**batch, "images": [[_clean_image(image, row_id) for image in images] for row_id, images in rows]}


def _clean_image(source: str | bytes | Path, row_id: str) -> dict[str, Any]:
    from processing_llava.data.clean_images import clean_image
    from processing_llava.data.data_sources import PICTURE_LIMITS

    try:
        return {"bytes": clean_image(source, limits=PICTURE_LIMITS), "path": None}
    except (ValueError, OSError) as error:
        raise ValueError(f"{error} (a picture of record {row_id!r})") from error
