"""The output folder of a run: who writes to it, what an earlier run left in it, and a disk that does not take it.

What is surprising: what an earlier run left is removed after the first step of the new one, and no earlier. Optimizer,
schedule and compiler are made inside of `Trainer.train`, where a recipe can still fail.
"""

import contextlib
import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .checkpoints import find_checkpoint, write_whole

logger = logging.get_logger(__name__)

_LOCK, _OWNER = ".lock", ".lock.json"
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
    lock, owner = FileLock(folder / _LOCK), folder / _OWNER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"got output_dir {str(output_dir)!r}, to which {_name_owner(owner)} writes; expected one run at a time: "
            "wait for it, or choose another output_dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        # What some network disks say: filelock before 4.0 raises the second one (filelock 4.3, _native/_unix.py).
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        logger.warning(f"{output_dir} cannot be locked ({error}): a second run in it would not be noticed")
    try:
        write_whole(owner, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        with contextlib.suppress(OSError):
            owner.unlink()
        lock.release()


def _name_owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        # It has the lock, and has not told yet.
        return "another process"


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
