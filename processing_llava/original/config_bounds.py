"""What config.json and generation_config.json of strangers may ask for: bounds of numbers, names of fields, no code.

What a number makes is compared with the weights later (`modeling_llava/checkpoints/weight_checks.py`). Here is what
would cost time or memory before that, in lists and loops over layers, heads and experts; what would take the place of
a method of a configuration; and settings of `generate`, which may stand in both files.
"""

import dataclasses
import inspect
import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

from processing_llava.config_fields import SIZES
from processing_llava.messages import shorten

from .model_types import TEXT_MODEL_OF_TYPE, TRANSFORMERS_CONFIGS

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
# fmt: off
GENERATION_SWITCHES = {
    "do_sample", "low_memory", "output_attentions", "output_logits", "output_scores", "remove_invalid_values",
    "renormalize_logits", "return_dict_in_generate", "token_healing", "use_cache",
}
"""Fields that are true or false."""
_SHARE, _FACTOR, _LENGTH, _SMALL = (0.0, 1.0), (0.0, 1e4), (0, MAX_SIZE), (0, 1000)
GENERATION_BOUNDS: dict[str, tuple[float, float]] = {
    "diversity_penalty": _FACTOR, "encoder_no_repeat_ngram_size": _SMALL, "encoder_repetition_penalty": _FACTOR,
    "epsilon_cutoff": _SHARE, "eta_cutoff": _SHARE, "guidance_scale": (-1e4, 1e4), "length_penalty": (-1e4, 1e4),
    "max_length": _LENGTH, "max_new_tokens": _LENGTH, "max_time": (0.0, 1e9), "min_length": _LENGTH,
    "min_new_tokens": _LENGTH, "min_p": _SHARE, "no_repeat_ngram_size": _SMALL, "num_beam_groups": (0, 64),
    "num_beams": (1, 64), "num_return_sequences": (1, 64), "penalty_alpha": _FACTOR, "repetition_penalty": _FACTOR,
    "temperature": _FACTOR, "top_h": _SHARE, "top_k": (-1, MAX_SIZE), "top_p": _SHARE, "typical_p": _SHARE,
}
"""The least and the most of what `generate` reads as a number; whole numbers where both are."""
_IDS = re.compile(r"\w+_token_ids?|(begin_)?suppress_tokens")
"""Token ids, or lists of them; -1 stands for none in files of 2023."""
_NO_PARTS = {"any_llava", *TEXT_MODEL_OF_TYPE, *TRANSFORMERS_CONFIGS}
"""What is no language model or tower; it would have parts of its own, and so on."""
_CONFIGS = re.compile(r"(\w+\.)*\w+_config|")
"""Where the fields of a configuration stand."""
OWN_NAMES = {
    name
    for name in dir(PreTrainedConfig)
    if not isinstance(inspect.getattr_static(PreTrainedConfig, name), property)
} - {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"model_type"}
"""What configurations have beside the fields of files, such as their methods: a field would take its place."""
# fmt: on


def check_values(fields: Any, file: str) -> None:
    """Refuse values that no model has, names that are none of fields, and kernels of the Hub, wherever they stand.

    Args:
        fields: The content of a config.json or generation_config.json.
        file: Its name, for the message.

    Raises:
        ValueError: naming file, field and value.
    """
    open_values = [("", fields)]
    while open_values:
        place, value = open_values.pop()
        name = place.rsplit(".", 1)[-1]
        if isinstance(value, dict):
            if _CONFIGS.fullmatch(place) and (found := OWN_NAMES & value.keys()):
                raise ValueError(
                    f"got a field {min(found)!r} in {file}, which is a name of transformers' own; expected fields of "
                    "a model: take it out"
                )
            open_values += [(f"{place}.{key}" if place else str(key), inner) for key, inner in value.items()]
        if name == "model_type" and name != place and isinstance(value, str) and value in _NO_PARTS:
            raise ValueError(
                f"got {place}={value!r} in {file}, a LLaVA inside of a LLaVA; expected a part: correct it"
            )
        if (expected := _find_expected(name, value)) is not None:
            raise ValueError(f"got {place}={shorten(value)} in {file}; expected {expected}: correct it")
        if isinstance(value, list):
            open_values += [(place, inner) for inner in value]
        elif isinstance(value, str) and "/" in value and _KERNELS.fullmatch(name):
            raise ValueError(
                f"got {place}={shorten(value)} in {file}, which would run code of the Hub; expected a name such as "
                "sdpa: take the field out"
            )
        elif isinstance(value, (int, float)) and value > (most := _find_most(name)):
            raise ValueError(
                f"got {place}={shorten(value)} in {file}; expected at most {most}, as no model has more: correct it"
            )


def _find_expected(name: str, value: Any) -> str | None:
    """What a setting of `generate` or the name of a kernel should have been; None if it is right, or another field."""
    if value is None:
        return None
    if _KERNELS.fullmatch(name) and not isinstance(value, (str, dict)):
        return "a name, such as sdpa"
    if name in GENERATION_SWITCHES and not isinstance(value, bool):
        return "true or false"
    if name == "output_hidden_states":
        layers = value if isinstance(value, list) else []
        is_right = isinstance(value, (bool, list)) and all(type(layer) is int for layer in layers)
        return None if is_right else "true or false"
    if name in GENERATION_BOUNDS:
        least, most = GENERATION_BOUNDS[name]
        kinds = (int,) if type(least) is int else (int, float)
        if type(value) not in kinds or not least <= value <= most:
            return f"a{' whole' if kinds == (int,) else ''} number from {least:g} to {most:g}"
    ids = value if isinstance(value, list) else [value]
    if _IDS.fullmatch(name) and not all(type(item) is int and -1 <= item <= MAX_SIZE for item in ids):
        return f"a token id, from 0 to {MAX_SIZE}, or a list of them"
    return None


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
