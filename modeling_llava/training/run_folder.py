"""The output folder of a run: who writes to it, what an earlier run left in it, its checkpoints, and a full disk.

A checkpoint is a folder `checkpoint-STEP` that the Trainer writes and `seal_checkpoint` ends. In it lie the settings
that decide the order of rows, and those that the state of the optimizer holds. With others, rows would be lost and
repeated, and a new learning rate would be stated but not used, since the optimizer brings its own.

What is surprising: what an earlier run left is removed after the first step of the new one, and no earlier. Optimizer,
schedule and compiler are made inside of `Trainer.train`, where a recipe can still fail.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging
from trl import SFTConfig

from modeling_llava.records.locks import hold_lock

from .recipe import Recipe
from .starting_model import LORA_DEFAULTS

logger = logging.get_logger(__name__)

_CHECKPOINTS = ("checkpoint-*",)
_MODELS = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "adapter_config.json", "config.json",
    "training_record.json",
)  # fmt: skip
"""What a run ends with. An `adapter_config.json` that stayed beside a new model would make another one of it."""


@contextlib.contextmanager
def lock_folder(output_dir: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if there is none; the lock ends with this process.

    Raises:
        ValueError: naming the process that writes to it.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    remedy = "expected one run at a time: wait for it, or choose another output_dir"
    with hold_lock(folder / ".lock", what=f"output_dir {str(output_dir)!r}", remedy=remedy):
        yield


def refuse_earlier_run(output_dir: str | Path, *, resume: bool, checkpoint: str | None) -> None:
    """Keep a new run away from the checkpoints of another one, which it would mix with its own, and from its model.

    Args:
        resume: Go on with the earlier run.
        checkpoint: What to go on from. A model without one is refused all the same, since nothing goes on from it.

    Raises:
        ValueError: naming what there is.
    """
    checkpoints, models = _find(output_dir, _CHECKPOINTS), _find(output_dir, _MODELS)
    if checkpoints and not resume:
        raise ValueError(
            f"got output_dir {str(output_dir)!r} with {checkpoints[0].name} of an earlier run; expected none: add "
            "--resume to go on with that run, --overwrite to remove it, or choose another output_dir"
        )
    if models and checkpoint is None:
        raise ValueError(
            f"got output_dir {str(output_dir)!r} with {models[0].name} of an earlier run; expected no model in it: "
            "add --overwrite to remove it, or choose another output_dir"
        )


class EarlierRun(TrainerCallback):
    """Takes out what an earlier run left, when a step of the new one was taken: nothing of the new one is there yet.

    Checkpoints, models, settings of adapters and curves go; other files stay.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.paths = _find(output_dir, (*_CHECKPOINTS, *_MODELS, "progress.csv", "progress.png"))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.paths:
            return
        for path in self.paths if state.is_world_process_zero else ():
            logger.warning(f"{path} of an earlier run is removed")
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.paths = []
        # Every process writes into a checkpoint, which may have the name of one that is removed.
        PartialState().wait_for_everyone()


def _find(output_dir: str | Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in Path(output_dir).glob(pattern))


# Checkpoints: which one is whole.

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


# A disk that does not take a file, and files that are written whole, or not at all.

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE = (errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENXIO, errno.ENODEV)
_WRITERS = ("Error while serializing", "unexpected pos", "PytorchStreamWriter failed", "Parent directory")
"""What safetensors and torch say of a file that cannot be written; they have no error number."""


@contextlib.contextmanager
def explain_disk(output_dir: str | Path) -> Iterator[None]:
    """Say what to do when a file cannot be written.

    Raises:
        ValueError: naming a folder that is gone or takes nothing, or the space that is left, and where `--resume`
            goes on.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        is_of_writer = not isinstance(error, OSError) and any(text in str(error) for text in _WRITERS)
        folder = Path(output_dir).resolve()
        if number in _FULL or (is_of_writer and os.access(folder, os.W_OK)):
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            free = shutil.disk_usage(existing).free / 2**20
            raise ValueError(
                f"got no room to write ({error}), with {free:,.0f} MiB free in {existing}; expected enough for a "
                f"checkpoint: make room, then add --resume, which goes on from {_find_start(output_dir)}"
            ) from error
        if is_of_writer or number in _UNWRITABLE or (number == errno.ENOENT and not folder.is_dir()):
            state = "which cannot be written" if folder.is_dir() else "which is gone"
            raise ValueError(
                f"got output_dir {str(output_dir)!r}, {state} ({error}); expected a folder that stays, on a disk that "
                f"takes files: mount it again, then add --resume, which goes on from {_find_start(output_dir)}"
            ) from error
        raise


def _find_start(output_dir: str | Path) -> str:
    try:
        return find_checkpoint(output_dir) or "the beginning"
    except OSError:
        return "the last whole checkpoint"


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once, so that a crash leaves the old one or the new one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.replace(path)
