"""What a resumed run has to keep: what decides the order of its rows, and what the state of its optimizer holds.

Every checkpoint has these settings beside it. With others, rows would be lost and repeated, and a new learning rate
would be stated but not used, since the optimizer brings its own.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from trl import SFTConfig

from .lora import LORA_DEFAULTS
from .recipe import Recipe

SETTINGS_FILE = "resume_settings.json"
OF_RECIPE = (
    "stage", "train_vision_tower", "template", "learn_tokens", "image_aspect_ratio", "max_length", "too_long",
    "tokens_per_batch", "images_per_batch", "projector_learning_rate", "vision_tower_learning_rate",
    "muon_learning_rate",
)  # fmt: skip
OF_TRAINER = (
    "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy",
    "dataloader_drop_last", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim",
    "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
)  # fmt: skip


def describe_settings(recipe: Recipe, arguments: SFTConfig, dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """The settings by their keys in a recipe, as JSON gives them back.

    Args:
        dataset: The rows that are trained on; those of a stream are not known before they are read.
    """
    settings: dict[str, Any] = {name: getattr(recipe, name) for name in OF_RECIPE}
    names = OF_TRAINER + fixed_lengths(recipe, arguments)
    settings |= {f"trainer.{name}": getattr(arguments, name) for name in names}
    if recipe.uses_lora:
        settings |= {f"lora.{name}": value for name, value in (LORA_DEFAULTS | recipe.lora).items()}
    settings["number of processes"] = arguments.world_size
    is_packed = recipe.tokens_per_batch is not None
    settings["rows"] = describe_rows(dataset, packed=is_packed) if isinstance(dataset, Dataset) else "streaming"
    # Of a recipe that is made in Python, fields of LoraConfig may be sets and objects.
    text = json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    return json.loads(text)


def fixed_lengths(recipe: Recipe, arguments: SFTConfig) -> tuple[str, ...]:
    """Which of the settings for the length of a run cannot change: schedule, or packed batches, depend on them."""
    schedule, warmup = arguments.lr_scheduler_type, arguments.warmup_steps
    # Below 1 it is a share of all steps.
    is_free = schedule == "constant" or (schedule == "constant_with_warmup" and not 0 < warmup < 1)
    if is_free and recipe.tokens_per_batch is None:
        return ()
    return ("max_steps",) if arguments.max_steps > 0 else ("max_steps", "num_train_epochs")


def describe_rows(dataset: Dataset, *, packed: bool) -> str:
    """Number and digest of the rows in their order; of packed ones with their lengths, which decide the batches.

    Rows that did not come from `load_rows` may have no ids, and are known by their number only.
    """
    columns = dataset.with_format(None)
    digest = hashlib.sha256()
    for name in ("id", "num_tokens", "num_images") if packed else ("id",):
        if name in columns.column_names:
            digest.update(json.dumps(columns[name][:]).encode())
    return f"{len(dataset):,} with digest {digest.hexdigest()[:16]}"


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
    # Versions may know different settings. Of LoraConfig only what is set is there.
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
