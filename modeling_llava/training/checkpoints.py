"""The checkpoints in the output folder of a run: which one is whole, and what a resumed run has to keep.

A checkpoint is a folder `checkpoint-STEP` that the Trainer writes and `seal_checkpoint` ends. In it lie the settings
that decide the order of rows, and those that the state of the optimizer holds. With others, rows would be lost and
repeated, and a new learning rate would be stated but not used, since the optimizer brings its own.
"""

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging
from trl import SFTConfig

from .recipe import Recipe
from .starting_model import LORA_DEFAULTS

logger = logging.get_logger(__name__)

FILES_FILE = "checkpoint_files.json"
"""Size and CRC-32 of every file of a checkpoint. It is written when all of them are on the disk."""


def find_checkpoint(output_dir: str | Path) -> str | None:
    """The last whole checkpoint of a run; one that is damaged, or whose writing was interrupted, is left out."""
    steps = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal() and path.is_dir():
            steps[int(number)] = path
    for _, path in sorted(steps.items(), reverse=True):
        damage = find_damage(path)
        if damage is None:
            return str(path)
        logger.warning(f"{path} is left out: {damage}")
    return None


def seal_checkpoint(checkpoint: str | Path) -> None:
    """Let a checkpoint count as whole: its files are on the disk, and their sizes and checksums stand beside them."""
    folder = Path(checkpoint)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILES_FILE):
        files[path.relative_to(folder).as_posix()] = _measure(path)
        _flush(path)
    write_whole(folder / FILES_FILE, json.dumps(files, indent=1) + "\n")
    _flush(folder / FILES_FILE)
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder, folder.parent):
        _flush(path)


def find_damage(checkpoint: str | Path) -> str | None:
    """What is missing or changed in a checkpoint since it was sealed; None if nothing is."""
    folder = Path(checkpoint)
    path = folder / FILES_FILE
    try:
        files = json.loads(path.read_text())
        changed = [name for name, facts in files.items() if _measure(folder / name) != facts]
    except FileNotFoundError as error:
        missing = Path(error.filename)
        if missing == path:
            return f"its writing did not end, without {FILES_FILE}"
        return f"{missing.relative_to(folder).as_posix()} is missing"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return f"it cannot be read ({error})"
    return f"{', '.join(changed)} changed since it was written" if changed else None


class WholeBest(TrainerCallback):
    """Lets a resumed run forget a best checkpoint that is damaged: the best of those to come takes its place."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.best_model_checkpoint is None:
            return
        damage = find_damage(state.best_model_checkpoint)
        if damage is not None:
            logger.warning(f"{state.best_model_checkpoint}, the best so far, is left out: {damage}")
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def _measure(path: Path) -> dict[str, int]:
    size, checksum = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return {"bytes": size, "crc32": checksum}


def _flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_resumable(checkpoint: str | Path) -> None:
    """Refuse a checkpoint of weights alone, from which the Trainer would go on with a fresh optimizer.

    Raises:
        ValueError: if there is no more in it.
    """
    # What the Trainer writes with optimizer and schedule, however many processes and shards there are.
    if not any(Path(checkpoint).glob("rng_state*.pth")):
        raise ValueError(
            f"got {checkpoint}, which holds weights alone (save_only_model); expected its optimizer too: start again "
            "without --resume in another output_dir, with this checkpoint as model"
        )


# What a resumed run has to keep.

SETTINGS_FILE = "resume_settings.json"
RECIPE_SETTINGS = (
    "stage", "train_vision_tower", "template", "learn_tokens", "image_aspect_ratio", "max_length", "too_long",
    "tokens_per_batch", "images_per_batch", "projector_learning_rate", "vision_tower_learning_rate",
)  # fmt: skip
TRAINER_SETTINGS = (
    "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy",
    "dataloader_drop_last", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim",
    "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
)  # fmt: skip


def describe_settings(recipe: Recipe, arguments: SFTConfig, dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """The settings by their keys in a recipe, as JSON gives them back.

    Args:
        dataset: The rows that are trained on; those of a stream are not known before they are read.
    """
    settings: dict[str, Any] = {name: getattr(recipe, name) for name in RECIPE_SETTINGS}
    names = TRAINER_SETTINGS + _fix_lengths(recipe, arguments)
    settings |= {f"trainer.{name}": getattr(arguments, name) for name in names}
    if recipe.uses_lora:
        settings |= {f"lora.{name}": value for name, value in (LORA_DEFAULTS | recipe.lora).items()}
    settings["number of processes"] = arguments.world_size
    is_packed = recipe.tokens_per_batch is not None
    settings["rows"] = _describe_rows(dataset, packed=is_packed) if isinstance(dataset, Dataset) else "streaming"
    # In a recipe that is made in Python, fields of LoraConfig may be sets and objects.
    text = json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    return json.loads(text)


def check_settings(checkpoint: str | Path, settings: dict[str, Any]) -> None:
    """Refuse a checkpoint of a run with other settings; one of the Trainer's alone does not know them.

    Args:
        settings: As `describe_settings` gives them.

    Raises:
        ValueError: naming every setting that differs, with both values.
    """
    path = Path(checkpoint) / SETTINGS_FILE
    if not path.is_file():
        return
    former = json.loads(path.read_text())
    # Versions may know different settings. Of the fields of LoraConfig only those that are set are there.
    names = [name for name in former | settings if name.startswith("lora.") or name in former.keys() & settings.keys()]
    changed = [
        f"{name}: {settings.get(name)!r} instead of {former.get(name)!r}"
        for name in names
        if settings.get(name) != former.get(name)
    ]
    if changed:
        raise ValueError(
            f"got other settings than {checkpoint} was trained with ({'; '.join(changed)}); expected the same, since "
            "rows would be lost or repeated, or the optimizer would keep its own: resume with the former ones, or "
            "start again without --resume in another output_dir, with this checkpoint as model"
        )


def _fix_lengths(recipe: Recipe, arguments: SFTConfig) -> tuple[str, ...]:
    """Which of the settings for the length of a run cannot change: schedule, or packed batches, depend on them."""
    schedule, warmup = arguments.lr_scheduler_type, arguments.warmup_steps
    # Below 1 it is a share of all steps.
    is_free = schedule == "constant" or (schedule == "constant_with_warmup" and not 0 < warmup < 1)
    if is_free and recipe.tokens_per_batch is None:
        return ()
    return ("max_steps",) if arguments.max_steps > 0 else ("max_steps", "num_train_epochs")


def _describe_rows(dataset: Dataset, *, packed: bool) -> str:
    """Number and digest of the rows in their order, and of the lengths that decide packed batches.

    Rows that did not come from `load_rows` may have no ids, and are known by their number only.
    """
    columns = dataset.with_format(None)
    digest = hashlib.sha256()
    for name in ("id", "num_tokens", "num_images") if packed else ("id",):
        if name in columns.column_names:
            digest.update(json.dumps(columns[name][:]).encode())
    return f"{len(dataset):,} with digest {digest.hexdigest()[:16]}"


# Files that are written whole, or not at all.


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once, so that a crash leaves the old one or the new one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.replace(path)
