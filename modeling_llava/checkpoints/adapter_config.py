"""adapter_config.json as strangers write it: numbers with bounds, patterns that end, and errors of one line."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import regex

from processing_llava.config_fields import naming_config
from processing_llava.messages import shorten, write_line
from processing_llava.original.file_checks import read_json

_PLAIN_PATTERN = re.compile(r"[\w.^$\\|-]*")
"""Regular expressions whose time grows with what they are matched with, and no faster."""
_MATCHING_SECONDS = 1.0
_RANK, _FACTOR = (int, 1, 2**16), (float, 1e-6, 1e6)
_BOUNDS = {
    "r": _RANK, "rank_pattern": _RANK, "lora_alpha": _FACTOR, "alpha_pattern": _FACTOR, "lora_dropout": (float, 0, 1),
}  # fmt: skip
"""The numbers of adapter_config.json: type, least and most; an adapter of rank or factor 0 has no effect."""


def import_peft() -> ModuleType:
    """PEFT, which only adapters need.

    Raises:
        ImportError: with the command that installs it.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("got an adapter, and PEFT is not installed; expected it: pip install peft") from error
    return peft


def read_adapter_config(name: str, download: dict[str, Any]) -> Any:
    """The configuration of an adapter of PEFT.

    Raises:
        ValueError: naming the file, if none can be made of it, or it holds a pattern that may match forever.
    """
    fields = read_json(name, "adapter_config.json", download) or {}
    _check_numbers(fields, f"{name}/adapter_config.json")
    for field in ("rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save"):
        patterns = fields.get(field) or []
        patterns = patterns if isinstance(patterns, (str, list, dict)) else [patterns]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if not isinstance(pattern, str) or not _PLAIN_PATTERN.fullmatch(pattern):
                raise ValueError(
                    f"got {field}={shorten(patterns)} in {name}/adapter_config.json; expected names of modules, which "
                    "repeat nothing: write them out"
                )
    with naming_adapter(name):
        return import_peft().PeftConfig.from_pretrained(name, **download)


@contextmanager
def naming_adapter(name: str) -> Iterator[None]:
    """Makes one line of what PEFT raises of an adapter_config.json that it cannot follow.

    Raises:
        ValueError: in place of it, and of an ImportError: other methods than LoRA may need packages of their own.
    """
    try:
        with naming_config(f"{name}/adapter_config.json"):
            yield
    except ImportError as error:
        raise ValueError(
            f"got {name}/adapter_config.json, which asks for what is not installed ({write_line(error, 300)}); "
            "expected LoRA, which needs PEFT alone: take another adapter"
        ) from error


def _check_numbers(fields: dict[str, Any], file: str) -> None:
    for field, (kind, least, most) in _BOUNDS.items():
        values = fields.get(field)
        for value in values.values() if isinstance(values, dict) else () if values is None else [values]:
            is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
            if not is_number or not least <= value <= most:
                raise ValueError(
                    f"got {field}={shorten(values)} in {file}; expected {'whole ' * (kind is int)}numbers from "
                    f"{least} to {most:g}: correct it"
                )


def write_out_patterns(names: list[str], peft_config: Any, name: str) -> None:
    """Give an adapter, in place, the modules that its patterns match: PEFT would match them without an end.

    Args:
        names: Names of all modules, as the adapter calls them.

    Raises:
        ValueError: naming the pattern, if it takes too long or is none.
    """
    end = time.monotonic() + _MATCHING_SECONDS
    for field in ("target_modules", "exclude_modules", "feedforward_modules"):
        pattern = vars(peft_config).get(field)
        if not isinstance(pattern, str) or pattern == "all-linear":
            continue
        try:
            left = (max(end - time.monotonic(), 1e-3) for _ in names)
            found = {item for item in names if regex.fullmatch(pattern, item, timeout=next(left))}
        except (TimeoutError, regex.error) as error:
            raise ValueError(
                f"got {field}={shorten(pattern)} in {name}/adapter_config.json, a pattern that cannot be matched "
                f"({error}); expected names of modules: write them out"
            ) from error
        setattr(peft_config, field, found)
