"""A lock that keeps other processes away from what one of them writes, and says who that is."""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import logging

logger = logging.get_logger(__name__)


@contextlib.contextmanager
def hold_lock(lock: Path, *, what: str, remedy: str) -> Iterator[None]:
    """Keep other processes out; the lock ends with this process, and its file stays.

    Args:
        lock: The file of the lock; beside it, `NAME.json` says who holds it.
        what: What is written, for messages, such as "output_dir 'runs/a'".
        remedy: What to do if another process writes to it.

    Raises:
        ValueError: naming the process that writes to it.
    """
    held, owner = FileLock(lock), lock.with_name(f"{lock.name}.json")
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"got {what}, to which {_name_owner(owner)} writes; {remedy}") from None
    except (OSError, NotImplementedError) as error:
        # What some network disks say: filelock before 4.0 raises the second one (filelock 4.3, _native/_unix.py).
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        logger.warning(f"{what} cannot be locked ({error}): a second process that writes to it would not be noticed")
    try:
        owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        with contextlib.suppress(OSError):
            owner.unlink()
        held.release()


def _name_owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        # It has the lock, and has not told yet.
        return "another process"
