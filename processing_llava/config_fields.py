"""Fields of a config.json that make no model, told by name and in one line before anything large is built.

transformers checks the types of most fields (5.23, configuration_utils.py), with an error of its own kind. Values that
it takes and cannot build from, such as no heads or an unknown activation, are found here.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .messages import shorten, write_line

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "image_size", "patch_size", "num_channels", "d_model", "n_heads",
    "n_layers", "max_seq_len",
)  # fmt: skip
"""Fields that are whole numbers above 0 where a model has them; the last four are MPT's."""
TILE_FIELDS = ("image_size", "patch_size", "num_channels")
ACTIVATIONS = ("hidden_act", "hidden_activation")
ROPE_TYPES = {"default", *ROPE_INIT_FUNCTIONS}
DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Of weights, with or without "torch." before; torch has further ones that no layer computes in."""

FAULTS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, StrictDataclassError, TypeError,
    ValueError,
)  # fmt: skip
"""What transformers and torch raise of a configuration that makes no model (transformers 5.23, torch 2.13)."""


@contextmanager
def naming_config(place: str) -> Iterator[None]:
    """Makes one line of what is raised inside while a configuration or a model is built.

    Args:
        place: What is built, such as "text_config".

    Raises:
        ValueError: in place of any of `FAULTS`; our own stays as it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FAULTS as error:
        text = write_line(error, 300)
        if isinstance(error, ValueError) and text.startswith("got "):
            raise
        raise ValueError(
            f"got {place} from which no model can be built ({type(error).__name__}: {text}); expected the fields of "
            "its model_type: correct config.json"
        ) from error


def build_config(
    place: str, fields: dict[str, Any], build: Callable[[dict[str, Any]], PreTrainedConfig]
) -> PreTrainedConfig:
    """A configuration of transformers from the fields of a file.

    Raises:
        ValueError: naming the field without which it can be built, if there is one.
    """
    check_dtype(fields.get("dtype", fields.get("torch_dtype")))
    try:
        return build(dict(fields))
    except FAULTS:
        for name, value in fields.items():
            with suppress(*FAULTS):
                build({other: fields[other] for other in fields if other != name})
                place = f"{place}.{name}={shorten(value)}"
                break
        with naming_config(place):
            raise


def check_sub_configs(raw: dict[str, Any], *, required: Collection[str]) -> None:
    """Refuse a config.json in which a part is empty: transformers would take a large model in its place.

    Raises:
        ValueError: naming the part.
    """
    for part in ("text_config", "vision_config"):
        fields = raw.get(part)
        if (part in raw or part in required) and not isinstance(fields, PreTrainedConfig):
            if not isinstance(fields, dict) or not fields:
                raise ValueError(
                    f"got {part}={shorten(fields)}; expected an object with the fields of its model: correct "
                    "config.json"
                )
            check_dtype(fields.get("dtype", fields.get("torch_dtype")))
            model_type = fields.get("model_type", "")
            if not isinstance(model_type, str):
                raise ValueError(
                    f"got {part}.model_type={shorten(model_type)}; expected a string: correct config.json"
                )


def check_dtype(dtype: Any) -> None:
    """Refuse what is no dtype of weights.

    Raises:
        ValueError: naming it.
    """
    if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
        raise ValueError(f"got dtype={shorten(dtype)}; expected one of {', '.join(DTYPES)}: correct config.json")


def use_one_side(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a tower, in which equal sides [n, n] of pictures and patches are n, as towers read them.

    Raises:
        ValueError: naming a field whose sides differ.
    """
    for name in ("image_size", "patch_size"):
        side = getattr(config, name, None)
        if isinstance(side, (list, tuple)):
            if len(side) != 2 or side[0] != side[1]:
                raise ValueError(
                    f"got vision_config.{name}={shorten(side)}; expected one number, since tiles are square: take "
                    "another tower"
                )
            setattr(config, name, side[0])
    return config


def check_part(part: str, config: PreTrainedConfig) -> None:
    """Refuse values of the configuration of a tower or language model from which nothing can be built.

    Raises:
        ValueError: naming the field.
    """
    if {"text_config", "vision_config"} & config.sub_configs.keys():
        _refuse(part, "model_type", config.model_type, "a model that has no text_config and no vision_config")
    fields = config.to_dict()
    for name in SIZES:
        value = fields.get(name)
        # Some models have one for each layer, or none.
        is_optional = value is None and name not in TILE_FIELDS
        if (
            name in fields
            and not is_optional
            and not isinstance(value, list)
            and not (type(value) is int and value > 0)
        ):
            _refuse(part, name, value, "a whole number above 0")
    heads, width = fields.get("num_attention_heads"), fields.get("hidden_size")
    groups = fields.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(width, int) and not fields.get("head_dim") and width % heads:
        _refuse(part, "num_attention_heads", heads, f"a divisor of hidden_size={width}")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        _refuse(part, "num_key_value_heads", groups, f"a divisor of num_attention_heads={heads}")
    for name in ACTIVATIONS:
        value = fields.get(name)
        if value is not None and not (isinstance(value, str) and value in ACT2FN):
            _refuse(part, name, value, "an activation of transformers, such as 'silu' or 'gelu'")
    for name in ("output_hidden_states", "output_attentions"):
        if not isinstance(fields.get(name), (bool, list, type(None))):
            _refuse(part, name, fields[name], "true or false")
    rope = fields.get("rope_parameters") or {}
    # One for each kind of layer in some models.
    for parameters in (rope, *rope.values()) if isinstance(rope, dict) else ():
        parameters = parameters if isinstance(parameters, dict) else {}
        rope_type, theta = parameters.get("rope_type", "default"), parameters.get("rope_theta", 1)
        if type(theta) not in (int, float) or not theta > 0:
            _refuse(part, "rope_parameters.rope_theta", theta, "a number above 0")
        if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
            _refuse(part, "rope_parameters.rope_type", rope_type, f"one of {', '.join(sorted(ROPE_TYPES))}")


def _refuse(part: str, name: str, value: Any, expected: str) -> None:
    raise ValueError(f"got {part}.{name}={shorten(value)}; expected {expected}: correct config.json")
