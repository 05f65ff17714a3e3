"""The checkpoints in the output folder of a run: which one is complete, and what stands in the way of writing files.

A checkpoint is a folder `checkpoint-STEP` into which the Trainer writes trainer_state.json last.
"""

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import logging

logger = logging.get_logger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHECKPOINTS = ("checkpoint-*",)
_MODELS = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "adapter_config.json", "config.json",
    "training_record.json",
)  # fmt: skip
"""What a run ends with. Of what stayed beside a new model, `adapter_config.json` would make another one of it."""
_CURVES = ("progress.csv", "progress.png")
_WRITING = ("Error while serializing", "unexpected pos", "PytorchStreamWriter failed")
"""What safetensors and torch say when a file cannot be written; they have no error number."""


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
    for path in _find(output_dir, (*_CHECKPOINTS, *_MODELS, *_CURVES)):
        logger.warning(f"{path} of an earlier run is removed")
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _find(output_dir: str | Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in Path(output_dir).glob(pattern))


@contextlib.contextmanager
def explain_full_disk(output_dir: str | Path) -> Iterator[None]:
    """Say what to do when a file cannot be written.

    Raises:
        ValueError: naming the space that is left and where `--resume` goes on.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        is_full = error.errno in _FULL if isinstance(error, OSError) else any(text in str(error) for text in _WRITING)
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
