"""What a checkpoint says of `generate`, in generation_config.json or config.json: read, and kept if it has an effect.

What is surprising: transformers keeps whatever stands in the file, and fails or never ends when it generates (5.23).
Here a value that no model has is an error of loading, and what has no place, such as a token id outside of the
vocabulary or a setting that asks for code or a cache of another kind, is left out with a line.
"""

from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from processing_llava.config_fields import naming_config
from processing_llava.messages import shorten, write_line
from processing_llava.original.config_bounds import GENERATION_BOUNDS, GENERATION_SWITCHES, check_values
from processing_llava.original.file_checks import find_file, read_json

from .layouts import merge_ids

logger = logging.get_logger(__name__)

ID_FIELDS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip
_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_KEPT = {*GENERATION_BOUNDS, *GENERATION_SWITCHES, "output_hidden_states"}


def check_generation_config(name: str, download: dict[str, Any]) -> None:
    """Refuse a generation_config.json that cannot be read, or holds values that no model has.

    Raises:
        ValueError: naming the file.
    """
    fields = read_json(name, "generation_config.json", download)
    if fields is not None:
        check_values(fields, f"{name}/generation_config.json")
        with naming_config(f"{name}/generation_config.json"):
            GenerationConfig.from_dict(fields)


def read_generation_config(name: str, config: PreTrainedConfig, download: dict[str, Any]) -> GenerationConfig:
    """The generation settings of a checkpoint, which also stop at the token that ends an answer in its format."""
    if find_file(name, "generation_config.json", download) is not None:
        settings = GenerationConfig.from_pretrained(name, **download)
    else:
        settings = GenerationConfig.from_model_config(config)
    settings.eos_token_id = merge_ids(settings.eos_token_id, config.text_config.eos_token_id)
    return settings


def leave_out_settings(model: PreTrainedModel, name: str) -> None:
    """Take out of a model's generation settings, in place, what has no effect or no place; a line says what."""
    if not model.can_generate():
        return
    settings, vocab_size = model.generation_config, model.config.text_config.vocab_size
    left_out = []
    for field, value in list(vars(settings).items()):
        kept = _keep(field, value, vocab_size)
        if kept != value:
            setattr(settings, field, kept)
            left_out.append(f"{field}={shorten(value)}")
    if left_out:
        logger.warning(
            write_line(
                f"{name}: of its settings of generate, {', '.join(left_out)} are left out: token ids outside of the "
                f"vocabulary of {vocab_size}, or settings that a checkpoint does not make; arguments of generate can"
            )
        )


def _keep(field: str, value: Any, vocab_size: int) -> Any:
    """What remains of a setting."""

    def is_known(token_id: Any) -> bool:
        return type(token_id) is int and 0 <= token_id < vocab_size

    if value is None or field.startswith("_") or field == "transformers_version":  # of files and objects
        return value
    if field in ID_FIELDS:
        if not isinstance(value, list):
            return value if is_known(value) and field not in _LISTS else None
        return list(filter(is_known, value)) or None
    if field == "bad_words_ids":
        words = value if isinstance(value, list) else []
        return [word for word in words if isinstance(word, list) and word and all(map(is_known, word))] or None
    if field == "early_stopping":
        return value if value in (True, False, "never") else None
    return value if field in _KEPT or value is False else None
