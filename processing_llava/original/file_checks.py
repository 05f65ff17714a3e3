"""The files behind the name of a model: found on this machine or on the Hub, and checked before anybody reads them.

Folders come from strangers. A file that some reader may open must be a plain file of its folder, of a size that its
kind has; links lead nowhere else, but to where the Hub's cache keeps what its snapshots link to. JSON is read here, or
by transformers and tokenizers after the same checks.
"""

import functools
import itertools
import json
import os
import re
import socket
import stat
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils import logging
from transformers.utils.hub import cached_file

from processing_llava.messages import shorten, write_line
from processing_llava.prompt_ids import refusing_panics

from .tokenizer_bounds import check_tokenizer

logger = logging.get_logger(__name__)

DOWNLOAD_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""What decides where files come from, in every `from_pretrained`."""

_MIB = 2**20
LIMITS = {
    re.compile(r"tokenizer(\..*)?\.json|vocab\.json"): (64 * _MIB, 3_000_000),  # Gemma 3 has 33 MB, 2 million values
    re.compile(r"tokenizer_config\.json|(special|added)_tokens(_map)?\.json"): (4 * _MIB, 300_000),
    re.compile(r"(.*_)?config\.json|chat_template\.json"): (_MIB, 20_000),  # which transformers copies many times
    re.compile(r".*\.index\.json"): (8 * _MIB, 300_000),
    re.compile(r".*\.jinja"): (2**18, None),
    re.compile(r"merges\.txt|vocab\.txt"): (16 * _MIB, None),
    re.compile(r"tokenizer\.model"): (8 * _MIB, None),
    re.compile(r".*\.(safetensors|bin)"): (2**63, None),
}
"""Most bytes, and most values of JSON, of the files that readers of models open, by patterns of their names."""
_OTHER_JSON = (64 * _MIB, 3_000_000)
MAX_DEPTH = 64
_TEMPLATES = "additional_chat_templates"


def select_download(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments of a `from_pretrained` that decide where files come from."""
    return {name: kwargs[name] for name in DOWNLOAD_KWARGS if kwargs.get(name) is not None}


def find_file(name: str, filename: str, download: dict[str, Any]) -> str | None:
    """The path of a file of a folder or Hub repository, downloaded if need be; None if there is no such file.

    Raises:
        OSError: in one line, if there is no such folder or repository, or it cannot be looked for.
        ValueError: naming a file that must not be read, whichever was asked for.
    """
    return cached_file(
        name,
        filename,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=True,
        **limit_download(name, download),
    )


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a repository on the Hub; a path of several parts cannot."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def limit_download(name: str, download: dict[str, Any]) -> dict[str, Any]:
    """The download settings with which a name can be read: of the cache alone, where the Hub does not answer.

    Raises:
        OSError: in one line, if there is no such folder, or the Hub cannot be asked and nothing of it is in the cache.
        ValueError: naming a file of a folder that must not be read.
    """
    if Path(name).is_dir():
        check_folder(Path(name), subfolder=download.get("subfolder") or "")
        return download
    if not is_hub_id(name):
        raise FileNotFoundError(f"there is no folder {name!r} on this machine")
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE forbids to ask the Hub"
    elif download.get("local_files_only"):
        reason = "local_files_only=True forbids to ask the Hub"
    elif not _hub_answers(int(time.monotonic() // 60)):
        reason = f"{constants.ENDPOINT} cannot be reached"
    else:
        return download
    kept = {key: download[key] for key in ("cache_dir", "revision") if key in download}
    folder = f"{download['subfolder']}/" if download.get("subfolder") else ""
    files = (f"{folder}{filename}" for filename in ("config.json", "adapter_config.json", "preprocessor_config.json"))
    if not any(isinstance(try_to_load_from_cache(name, file, **kept), str) for file in files):
        raise FileNotFoundError(f"{name} is neither a folder nor in the cache of the Hub, and {reason}")
    return download | {"local_files_only": True}


@functools.lru_cache(maxsize=1)
def _hub_answers(minute: int) -> bool:
    """Whether the Hub, or the proxy before it, takes a connection; asked once a minute.

    huggingface_hub 2.4 tries six times for each of a dozen files (http_backoff in utils/_http.py), 23 s every time.
    """
    hub = urlsplit(constants.ENDPOINT)
    proxy = None if proxy_bypass(hub.hostname) else getproxies().get(hub.scheme)
    address = urlsplit(proxy) if proxy else hub
    try:
        port = address.port or {"http": 80, "https": 443}[address.scheme]
        socket.create_connection((address.hostname, port), timeout=constants.HF_HUB_ETAG_TIMEOUT).close()
    except OSError as error:
        logger.warning(f"{constants.ENDPOINT} cannot be reached ({error}); only what is in the cache is used")
        return False
    return True


def check_folder(folder: Path, *, subfolder: str = "") -> None:
    """Refuse a folder with a file that a reader may open and that is none, lies elsewhere, or is too large.

    Args:
        folder: On this machine.
        subfolder: Where in it the model is.

    Raises:
        ValueError: naming the file.
    """
    roots = _find_roots(folder)
    for place in (folder / subfolder, folder / subfolder / _TEMPLATES):
        if not place.is_dir():
            continue
        with os.scandir(place) as entries:
            for entry in entries:
                limits = next((limits for pattern, limits in LIMITS.items() if pattern.fullmatch(entry.name)), None)
                if limits is not None:
                    _check_file(Path(entry.path), roots, *limits)


def _find_roots(folder: Path) -> tuple[Path, ...]:
    """Where the files of a folder may be: in it, or in the blobs of the repository of which it is a snapshot."""
    real = folder.resolve()
    for parent in (real, *real.parents):
        if parent.parent.name == "snapshots" and parent.parent.parent.name.startswith("models--"):
            return real, (parent.parent.parent / "blobs").resolve()
    return (real,)


def _check_file(path: Path, roots: tuple[Path, ...], max_bytes: int, max_values: int | None) -> None:
    try:
        real = path.resolve(strict=True)
        found = real.stat()
    except (OSError, RuntimeError) as error:  # a loop is the latter before Python 3.13
        raise ValueError(f"got {path}, a link to nothing; expected a file: copy it there") from error
    # `huggingface-cli download --local-dir` made links into the cache (huggingface_hub before 0.23).
    is_cached = real.parent.name == "blobs" and real.parents[2:3] == (Path(constants.HF_HUB_CACHE).resolve(),)
    if not is_cached and not any(real.is_relative_to(root) for root in roots):
        raise ValueError(f"got {path}, a link out of its folder; expected a file: copy it there")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"got {path}, which is no plain file; expected one: take another checkpoint")
    if found.st_size > max_bytes:
        raise ValueError(
            f"got {path} of {found.st_size:,} bytes; expected at most {max_bytes:,}: no model needs more, take "
            "another one"
        )
    if max_values is not None and found.st_size > max_values:
        num_values = _count_values(str(path), found.st_size, found.st_mtime_ns)
        if num_values > max_values:
            raise ValueError(
                f"got {path} with {num_values:,} values; expected at most {max_values:,}: no model needs more, take "
                "another one"
            )


@functools.lru_cache(maxsize=64)
def _count_values(path: str, size: int, modified: int) -> int:
    """At least as many as the values of a JSON file, each of which may take 64 bytes; once for each content."""
    with open(path, "rb") as file:
        return sum(chunk.count(sign) for chunk in iter(lambda: file.read(_MIB), b"") for sign in (b",", b"[", b"{"))


def read_json(name: str, filename: str, download: dict[str, Any]) -> dict[str, Any] | None:
    """The content of a JSON file of a folder or Hub repository; None if there is no such file.

    Raises:
        ValueError: naming the file, if it must not be read, is not JSON, or no object.
    """
    path = find_file(name, filename, download)
    return None if path is None else load_json(Path(path))


def load_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, which must be an object.

    Raises:
        ValueError: naming the file, also for a key that stands there twice, for numbers that are none, and for values
            inside of more than `MAX_DEPTH` others.
    """
    limits = (limits for pattern, limits in LIMITS.items() if pattern.fullmatch(path.name))
    _check_file(path, _find_roots(path.parent), *next(limits, _OTHER_JSON))
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_read_object, parse_constant=_read_constant
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"got {path}, which is not JSON; expected one object: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"got {path}, which holds {shorten(content)}; expected one object: copy the file again")
    level = [content]
    for _ in range(MAX_DEPTH):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [value for value in itertools.chain.from_iterable(parts) if isinstance(value, (dict, list))]
    if level:
        raise ValueError(
            f"got {path}, in which values are nested deeper than {MAX_DEPTH}; expected a file that a program wrote: "
            "take another checkpoint"
        )
    return content


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{shorten(name)} stands there twice")
    return fields


def _read_constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)


@contextmanager
def in_one_line() -> Iterator[None]:
    """Makes one line of the errors inside, which quote files of strangers: names of weights, of files, of fields.

    Raises:
        ValueError: in place of one whose text has several lines or no end.
        OSError: the same.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        line = write_line(error)
        if line == str(error):
            raise
        raise (ValueError if isinstance(error, ValueError) else OSError)(line) from error


PROCESSOR_FILES = (
    "processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.json", "vocab.json", "chat_template.json",
)  # fmt: skip


def check_tokenizer_files(name: str, download: dict[str, Any]) -> None:
    """Refuse a tokenizer.json that costs more than a tokenizer does, whichever of them transformers reads.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    # Where others are listed, it may be one of them (transformers 5.24, tokenization_utils_base.py).
    listed = (read_json(name, "tokenizer_config.json", download) or {}).get("fast_tokenizer_files")
    others = [other for other in listed if isinstance(other, str)] if isinstance(listed, list) else []
    for filename in (
        "tokenizer.json",
        *(other for other in others if re.fullmatch(r"tokenizer\.[\w.]+\.json", other)),
    ):
        if (path := find_file(name, filename, download)) is not None:
            check_tokenizer(Path(path))


@contextmanager
def naming_file(name: str, download: dict[str, Any]) -> Iterator[None]:
    """Tells which file of a processor is broken, where reading them fails inside.

    Raises:
        ValueError: in place of what the readers raise, which may be anything (tokenizers 0.23 has no error of its
            own); our own and OSErrors stay, where each file is an object.
    """
    try:
        with refusing_panics():
            yield
    except ImportError:
        raise
    except Exception as error:
        for filename in PROCESSOR_FILES:
            read_json(name, filename, download)
        if isinstance(error, OSError) or (isinstance(error, ValueError) and str(error).startswith("got ")):
            raise
        found = f"{type(error).__name__}: {write_line(error, 300)}"
        raise ValueError(
            f"got {name}, of whose files no processor can be made ({found}); expected those of its tokenizer and "
            "image processor: copy them again"
        ) from error
