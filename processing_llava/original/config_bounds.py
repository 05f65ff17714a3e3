"""What a config.json of strangers may ask for: bounds of its numbers, and no code, kernels of the Hub included.

What a number makes is compared with the weights later (`modeling_llava/checkpoints/weight_checks.py`). Here is what
would cost time or memory before that, in lists and loops over layers, heads and experts.
"""

import re
from typing import Any

from transformers.utils import logging

from processing_llava.config_fields import SIZES
from processing_llava.messages import shorten

logger = logging.get_logger(__name__)

MAX_SIZE = 2**25
"""Of any size; the longest context so far has 10,485,760 tokens."""
MAX_LABELS = 10_000
"""transformers writes a name for each (5.23, configuration_utils.py)."""
_KERNELS = re.compile(r"_?(attn|experts)_implementation(_\w+)?")
"""Fields that choose code by name; a name with a slash is a repository of the Hub, from which code would be run."""
MAX_COUNTS = {"layers": 256, "heads": 4096, "experts": 4096, "depth": 256, "blocks": 256}
"""Most of what is built one after the other, by a word in the name of its field."""
_COUNT = re.compile(rf"({'|'.join(MAX_COUNTS)}|layer)s?(?![a-z])")


def check_values(fields: Any, file: str) -> None:
    """Refuse numbers of a config.json that no model has, and kernels of the Hub, wherever they stand in it.

    Args:
        fields: Its content.
        file: Its name, for the message.

    Raises:
        ValueError: naming file, field and value.
    """
    open_values = [("", fields)]
    while open_values:
        place, value = open_values.pop()
        if isinstance(value, dict):
            open_values += [(f"{place}.{key}" if place else str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            open_values += [(place, inner) for inner in value]
        elif isinstance(value, str) and "/" in value and _KERNELS.fullmatch(place.rsplit(".", 1)[-1]):
            raise ValueError(
                f"got {place}={shorten(value)} in {file}, which would run code of the Hub; expected a name such as "
                "sdpa: take the field out"
            )
        elif isinstance(value, (int, float)) and value > (most := _find_most(place.rsplit(".", 1)[-1])):
            raise ValueError(
                f"got {place}={shorten(value)} in {file}; expected at most {most}, as no model has more: correct it"
            )


def _find_most(name: str) -> float:
    """The largest value of a field."""
    if name == "num_labels":
        return MAX_LABELS
    if name in SIZES and not name.endswith(("layers", "heads")):
        return MAX_SIZE
    found = _COUNT.search(name) if name.startswith(("num_", "n_")) or name.endswith(("layers", "depth")) else None
    return float("inf") if found is None else MAX_COUNTS.get(found[1], MAX_COUNTS["layers"])


def log_ignored_code(fields: dict[str, Any] | None, file: str) -> None:
    """Say once that a checkpoint brings code, which is never run: nothing that is loaded here needs any."""
    if fields and fields.get("auto_map"):
        logger.warning_once(f"{file} names code of its own (auto_map); it is not run, as nothing here needs it")
