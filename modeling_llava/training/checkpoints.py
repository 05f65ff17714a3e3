"""The checkpoints in the output folder of a run: which one is complete, and what a resumed run has to keep.

A checkpoint is a folder `checkpoint-STEP` into which the Trainer writes trainer_state.json last (transformers 5.23,
trainer.py). Beside it lie the settings that decide the order of rows, and those that the state of the optimizer holds.
With others, rows would be lost and repeated, and a new learning rate would be stated but not used, since the optimizer
brings its own.
"""

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from safetensors import SafetensorError
from transformers.utils import logging
from trl import SFTConfig

from .recipe import Recipe
from .starting_model import LORA_DEFAULTS

logger = logging.get_logger(__name__)

_CHECKPOINTS = ("checkpoint-*",)
_MODELS = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "adapter_config.json", "config.json",
    "training_record.json",
)  # fmt: skip
"""What a run ends with. An `adapter_config.json` that stayed beside a new model would make another one of it."""


def find_checkpoint(output_dir: str | Path) -> str | None:
    """The last complete checkpoint of a run; one whose writing was interrupted is left out."""
    complete = {}
    for state in Path(output_dir).glob("checkpoint-*/trainer_state.json"):
        try:
            complete[json.loads(state.read_text())["global_step"]] = str(state.parent)
        except (ValueError, KeyError):
            logger.warning(f"{state.parent} is incomplete and is left out")
    return complete[max(complete)] if complete else None


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


def refuse_earlier_run(output_dir: str | Path, *, resume: bool = False) -> None:
    """Keep a new run away from the checkpoints of another one, which it would mix with its own, and from its model.

    Args:
        resume: Go on from a checkpoint; a model without one is refused all the same, since nothing goes on from it.

    Raises:
        ValueError: naming what there is.
    """
    checkpoints, models = _find(output_dir, _CHECKPOINTS), _find(output_dir, _MODELS)
    if checkpoints and not resume:
        raise ValueError(
            f"got output_dir {str(output_dir)!r} with {checkpoints[0].name} of an earlier run; expected none: add "
            "--resume to go on with that run, --overwrite to remove it, or choose another output_dir"
        )
    if models and not (resume and find_checkpoint(output_dir)):
        raise ValueError(
            f"got output_dir {str(output_dir)!r} with {models[0].name} of an earlier run; expected no model in it: "
            "add --overwrite to remove it, or choose another output_dir"
        )


def remove_earlier_run(output_dir: str | Path) -> None:
    """Take out checkpoints, models, settings of adapters, and curves; other files stay."""
    for path in _find(output_dir, (*_CHECKPOINTS, *_MODELS, "progress.csv", "progress.png")):
        logger.warning(f"{path} of an earlier run is removed")
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _find(output_dir: str | Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in Path(output_dir).glob(pattern))


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


@contextlib.contextmanager
def explain_full_disk(output_dir: str | Path) -> Iterator[None]:
    """Say what to do when a file cannot be written.

    Raises:
        ValueError: naming the space that is left and where `--resume` goes on.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError):
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        else:
            # What safetensors and torch say of a file that cannot be written; they have no error number.
            texts = ("Error while serializing", "unexpected pos", "PytorchStreamWriter failed")
            is_full = any(text in str(error) for text in texts)
        if not is_full:
            raise
        folder = Path(output_dir).resolve()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free / 2**20
        start = find_checkpoint(output_dir) or "the beginning"
        raise ValueError(
            f"got no room to write ({error}), with {free:,.0f} MiB free in {existing}; expected enough for a "
            f"checkpoint: make room, then add --resume, which goes on from {start}"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once, so that a crash leaves the old one or the new one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.replace(path)
