"""Whether weights are those of a configuration: found by names and shapes, before anything large is allocated.

A model without weights (on "meta") is built of the configuration, and compared with the headers of the files. Neither
is trusted: the configuration may ask for any size, and building stops where it asks for more than the files hold.
"""

import copy
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations import is_deepspeed_zero3_enabled

from processing_llava.config_fields import naming_config

from .original_weights import is_left_out, is_used
from .weight_files import Weight, read_model
from .weight_names import rename_to_ours

SPARE_PARAMETERS = 10_000
"""How many more a model may register while it is built than its files hold: those of a tower before it is pruned."""
MAX_GROWTH = 16
"""How many numbers of a model one stored number may stand for: two, eight or more, where weights have few bits."""
SPARE_NUMBERS = 2**24
MAX_BUFFER_NUMBERS = 2**26
"""Tables that are computed and lie in no file, such as those of positions."""


def check_fit(
    model_class: type,
    config: PreTrainedConfig,
    weights: dict[str, Weight],
    name: str,
    *,
    is_exact: bool = True,
    takes_any_shape: bool = False,
) -> None:
    """Refuse weights that are not those of a model, by the headers of their files.

    What the files hold under names that transformers itself translates is left to it, and to `refuse_unfit`. So is a
    run that DeepSpeed's ZeRO-3 shards: there transformers shards whatever is built, which "meta" has nothing of.

    Args:
        model_class: Ours, or transformers' own.
        config: The configuration that it will be built of.
        weights: What was read, by our names.
        name: Folder or Hub id.
        is_exact: Whether names and shapes have to be equal; not for weights in fewer bits.
        takes_any_shape: The caller wants new weights where shapes differ.

    Raises:
        ValueError: naming file, weight and shapes.
    """
    if is_deepspeed_zero3_enabled():
        return
    with naming_config(f"{name}/config.json"), torch.device("meta"), bounding_parameters(len(weights), name):
        model = model_class(copy.deepcopy(config))
    if model.base_model is model:  # names are one word shorter there
        weights = {key.removeprefix("model."): weight for key, weight in weights.items() if key[:8] != "lm_head."}
    theirs = config.model_type != "any_llava"
    shapes = {
        rename_to_ours(key, "transformers") if theirs else key: list(parameter.shape)
        for key, parameter in model.named_parameters()
    }
    if theirs:
        num_layers = config.vision_config.num_hidden_layers
        foreign = [key for key in weights.keys() - shapes.keys() if not is_left_out(key, num_layers=num_layers)]
    else:
        foreign = [key for key in weights.keys() - shapes.keys() if is_used(key, config)]
    found = {
        "mismatched_keys": [
            (key, weights[key].shape, shape)
            for key, shape in shapes.items()
            if key in weights and weights[key].shape != shape
        ],
        "missing_keys": list(shapes.keys() - weights.keys()),
        "unexpected_keys": foreign,
    }
    if takes_any_shape:
        found["mismatched_keys"] = []
    if is_exact and not (found["missing_keys"] and _may_be_renamed(model, foreign)):
        refuse_unfit_weights(found, weights, name)
    num_stored = sum(prod(weight.shape) for weight in weights.values())
    num_wanted = sum(map(prod, shapes.values()))
    num_computed = sum(buffer.numel() for buffer in model.buffers())
    if num_wanted > MAX_GROWTH * num_stored + SPARE_NUMBERS or num_computed > MAX_BUFFER_NUMBERS + num_stored:
        raise ValueError(
            f"got {name}, whose config.json asks for {num_wanted:,} parameters and {num_computed:,} numbers of "
            f"tables, and whose files hold {num_stored:,}; expected equal sizes: correct config.json"
        )


def _may_be_renamed(model: PreTrainedModel, keys: list[str]) -> bool:
    """Whether transformers translates one of these names for a part of the model."""
    parts = [model.base_model.language_model, model.base_model.vision_tower]
    parts += [model] if model.config.model_type == "any_llava" else []
    transforms = [item for part in parts for item in get_model_conversion_mapping(part, add_legacy=False)]
    patterns = [pattern.lstrip("^") for transform in transforms for pattern in transform.source_patterns]
    return any(re.search(pattern, key) for pattern in patterns for key in keys)


@contextmanager
def bounding_parameters(num_stored: int, name: str) -> Iterator[None]:
    """Stops a model that registers many more parameters inside of this than its files hold.

    Raises:
        ValueError: naming the model.
    """
    num_left, builder = num_stored + SPARE_PARAMETERS, threading.get_ident()

    def count(module: torch.nn.Module, key: str, parameter: torch.nn.Parameter) -> None:
        nonlocal num_left
        num_left -= threading.get_ident() == builder
        if num_left < 0:
            raise ValueError(
                f"got {name}, whose config.json asks for more layers than its files hold, which have {num_stored} "
                "weights; expected equal numbers: correct config.json"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def refuse_unfit(
    model: PreTrainedModel,
    info: dict[str, Any],
    name: str,
    *,
    weights: dict[str, Weight] | None = None,
    download: dict[str, Any] | None = None,
    takes_any_shape: bool = False,
) -> None:
    """Refuse a model of which a part was not loaded, and weights without a place in it.

    Args:
        weights: What was read, by our name; None to look it up in the files of `name`.
        takes_any_shape: The caller wants new weights where shapes differ.

    Raises:
        ValueError: naming file, weight and shapes.
    """
    is_whole = model.base_model is not model
    found = {
        "missing_keys": info["missing_keys"],
        "mismatched_keys": [] if takes_any_shape else info["mismatched_keys"],
        "unexpected_keys": [
            key
            for key in info["unexpected_keys"]
            if is_used(key, model.config) and (is_whole or not key.startswith("lm_head."))
        ],
    }
    if any(found.values()):
        weights = read_model(name, download or {}) if weights is None else weights
        if not is_whole:
            weights = {key.removeprefix("model."): weight for key, weight in weights.items()}
        refuse_unfit_weights(found, weights, name)


def refuse_unfit_weights(found: dict[str, Any], weights: dict[str, Weight], name: str) -> None:
    """Refuse a model or adapter of which a part was not loaded, or weights that have no place.

    Args:
        found: `mismatched_keys` (name, found and expected shape), `missing_keys` and `unexpected_keys`, as
            transformers reports them.
        weights: What was read, by the names in `found` as far as they are the same.
        name: Folder or Hub id.

    Raises:
        ValueError: naming file, weight and shapes.
    """

    def place(key: str) -> str:
        return f"{weights[key].key} in {weights[key].file}" if key in weights else f"{key} in {name}"

    for key, shape, expected in sorted(found["mismatched_keys"]):
        stored = weights[key].key if key in weights else key
        where = weights[key].file if key in weights else name
        raise ValueError(
            f"got {stored} of shape {list(shape)} in {where}; expected {list(expected)} as the configuration of the "
            f"model says: this weight belongs to another model than {name}"
        )
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        raise ValueError(
            f"got {name} without {len(missing)} weights, {missing[0]} among them; expected all: a file is incomplete "
            "or of another model"
        )
    if unexpected:
        raise ValueError(
            f"got {len(unexpected)} weights without a place in the model, {place(unexpected[0])} among them; expected "
            "those of this architecture alone: they are of another model"
        )
