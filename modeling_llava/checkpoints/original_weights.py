"""The weights of an original checkpoint, gathered from its parts, under our names.

1. The language model: the folder's own, or the base model's where the folder has none (LoRA, projector only), or the
   sum of both (delta).
2. What the folder trained beside it: projector, newline, token embeddings.
3. The tower: the folder's own if it has one, else the one that config.json names.

What is surprising: weights that the pruned tower does not need are not loaded. Saving in the original layout takes
them from the source again, and leaves the tower out if it is still the named one.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from processing_llava.messages import write_line
from processing_llava.original.file_checks import find_file, read_json
from processing_llava.original.model_parts import explain_tower
from processing_llava.original.original_folder import OriginalFolder

from .model_names import explain_missing
from .weight_files import (
    COMPUTED,
    Sum,
    Weight,
    has_model,
    read_file,
    read_model,
    refuse_infinite,
    refuse_integers,
    refuse_quantized,
)
from .weight_names import grow_rows, rename_to_ours

logger = logging.get_logger(__name__)

TOWER = "model.vision_tower."
PROJECTOR_PREFIX = "model.mm_projector."
_LANGUAGE_MODEL = "model.language_model."
_DELTA_NORM = 0.02
"""Mean size of norm weights: those of a trained language model are far above, those of a delta far below."""
_DELTA_SHARE = 0.25
_TOKEN_MATRICES = ("model.language_model.embed_tokens.weight", "lm_head.weight")


def gather_original_weights(
    folder: OriginalFolder, config: PreTrainedConfig, *, delta: bool | None = None
) -> tuple[dict[str, Weight], str]:
    """All weights of an original checkpoint under our names, and a line on where they come from.

    Args:
        delta: Whether the weights are to be added to those of a base; None to look at its norms.

    Raises:
        ValueError: if a part is missing or cannot be read, or there is a base for a complete model, or none for a
            delta.
    """
    weights = {}
    parts = []
    if folder.base_model is not None and is_same_name(folder.base_name, folder.name):
        raise ValueError(f"got base_model={folder.base_name!r} for itself; expected another model: leave it out")
    if has_model(folder.name, folder.download):
        weights = _read_parts(folder.name, folder.config, folder.download)
        parts.append(f"language model of {folder.name}")
        base = None if folder.base_model is None else _read_base(folder)
        if check_delta(folder, config, weights, base, delta=delta):
            weights = add_base(weights, base)
            parts[-1] = f"sum of the delta {folder.name} and {folder.base_name}"
    else:
        if delta:
            raise ValueError(f"got delta=True for {folder.name}, which holds no language model; expected a delta")
        if folder.base_name is None:
            raise ValueError(
                f"got {folder.name}, which holds no language model and does not say which it was trained on; expected "
                "base_model=: the folder or Hub id of that model"
            )
        weights = _read_base(folder)
        trained = read_trained_parts(folder.name, folder.download)
        if any(key.startswith(PROJECTOR_PREFIX) for key in trained):  # which comes whole
            weights = {key: weight for key, weight in weights.items() if not key.startswith(PROJECTOR_PREFIX)}
        weights |= trained
        parts.append(f"language model of {folder.base_name}")
        parts += sorted({Path(weight.file).name for weight in trained.values()})
        if not any(key.startswith(PROJECTOR_PREFIX) for key in trained):
            parts.append(f"projector of {folder.base_name}")
        grow_token_matrices(weights, config.text_config.vocab_size)
    if any(key.startswith(TOWER) for key in weights):
        parts.append("vision tower of the checkpoint")
    else:
        with explain_tower(folder.vision_tower):
            weights |= read_named_tower(folder.vision_tower, folder.base_download)
        parts.append(f"vision tower of {folder.vision_tower}")
    return weights, f"{folder.name}: {', '.join(parts)}"


def keep_used(weights: dict[str, Weight], config: PreTrainedConfig) -> dict[str, Weight]:
    """The weights that have a place; a line names an output layer that the configuration says not to use."""
    head, embeddings = weights.get("lm_head.weight"), weights.get(_TOKEN_MATRICES[0])
    has_both = config.tie_word_embeddings and head is not None and embeddings is not None
    if has_both and not torch.equal(head.data[...], embeddings.data[...]):
        logger.warning(
            write_line(
                f"{head.key} in {head.file} is not used: config.json ties the output layer to {embeddings.key} "
                "(tie_word_embeddings), which differs from it"
            )
        )
    return {key: weight for key, weight in weights.items() if is_used(key, config)}


def read_trained_parts(name: str, download: dict[str, Any]) -> dict[str, Weight]:
    """What a run of the original trained beside the language model or its adapter, under our names."""
    weights = {}
    for filename in ("mm_projector.bin", "non_lora_trainables.bin"):
        path = find_file(name, filename, download)
        if path is not None:
            parts = read_file(path)
            refuse_integers(name, parts)
            refuse_infinite(parts)
            weights |= _rename(parts)
    return weights


def _read_base(folder: OriginalFolder) -> dict[str, Weight]:
    name, download = folder.base_name, folder.base_download
    with explain_missing(name, part="base model", kind=" of a language model"):
        return _read_parts(name, read_json(name, "config.json", download), download)


def _read_parts(name: str, config: dict[str, Any] | None, download: dict[str, Any]) -> dict[str, Weight]:
    """The weights of a model under our names.

    Raises:
        ValueError: if they are stored quantized.
    """
    refuse_quantized(name, config, {})
    weights = _rename(read_model(name, download))
    refuse_quantized(name, config, weights)
    return weights


def is_same_name(one: str, other: str) -> bool:
    """Whether two names are one repository, or one folder."""
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())


def check_delta(
    folder: OriginalFolder,
    config: PreTrainedConfig,
    weights: dict[str, Weight],
    base: dict[str, Weight] | None,
    *,
    delta: bool | None,
) -> bool:
    """Whether the weights of a folder are a delta to add to its base.

    Training hardly changes the norms of a language model: those of a delta are near 0 beside those of its base, and
    those of a complete model are near them.

    Args:
        weights: The folder's, under our names.
        base: Its base's, if one was given.
        delta: What the caller says it is; None to look.

    Raises:
        ValueError: if it is a delta without a base, a complete model with one, or cannot be told.
    """
    if base is None:
        # Gemma's norms are stored around 0.
        looks_so = config.text_config.model_type != "gemma" and _measure_norms(weights) < _DELTA_NORM
        if delta or (delta is None and looks_so):
            raise ValueError(
                f"got {folder.name}, a delta (its norm weights are near 0), without its base; expected base_model=: "
                "the folder or Hub id of the model that it is to be added to, or delta=False for a complete model"
            )
        return False
    complete = (
        f"got base_model={folder.base_name!r} for {folder.name}, which is a complete model; expected one for a LoRA, "
        "a projector or a delta: leave base_model out"
    )
    if delta is not None:
        if not delta:
            raise ValueError(complete)
        return True
    share = _measure_norms(weights, base)
    if abs(share) < _DELTA_SHARE:
        return True
    if abs(share - 1) < _DELTA_SHARE:
        raise ValueError(complete)
    add_base(weights, base)  # a base of another size is the plainer fault
    raise ValueError(
        f"got base_model={folder.base_name!r} for {folder.name}, of which the norm weights do not tell whether it is "
        "a complete model or a delta; expected a word: leave base_model out, or add delta=True"
    )


def _measure_norms(weights: dict[str, Weight], base: dict[str, Weight] | None = None) -> float:
    """Mean size of the norm weights of a language model; or how much of the base's is in them, 1 for the base."""
    norms = {
        key: weight
        for key, weight in weights.items()
        if key.startswith(_LANGUAGE_MODEL) and key.endswith(".weight") and len(weight.shape) == 1
    }
    if base is None:
        values = [weight.data[...].float().abs().mean().item() for weight in norms.values()]
        return sum(values) / len(values) if values else math.nan
    product = square = 0.0
    for key, weight in norms.items():
        if key in base and base[key].shape == weight.shape:
            own, other = weight.data[...].double(), base[key].data[...].double()
            product += (own * other).sum().item()
            square += (other * other).sum().item()
    return product / square if square else math.nan


def _rename(weights: dict[str, Weight]) -> dict[str, Weight]:
    """Our names for those of an original file; files of a LoRA run carry prefixes of PEFT."""
    renamed = {}
    for key, weight in weights.items():
        key = key.removeprefix("base_model.")
        key = key.removeprefix("model.") if key.startswith(("model.model.", "model.lm_head.")) else key
        # Some early projector files have no prefix at all.
        key = f"model.{key}" if key.startswith("mm_projector.") else key
        renamed[rename_to_ours(key, "original")] = weight
    return renamed


def is_used(key: str, config: PreTrainedConfig) -> bool:
    """Whether a weight has a place: not what pruning removes from a tower, nor buffers, which are computed."""
    if is_left_out(key, num_layers=max(config.vision_feature_layers)):
        return False
    if key == "model.image_newline":
        return config.patch_merge_type == "spatial_unpad"
    return not (key == "lm_head.weight" and config.tie_word_embeddings)


def is_left_out(key: str, *, num_layers: int) -> bool:
    """Whether a weight is a buffer, or lies in a tower behind its layer number `num_layers`."""
    if key.endswith(COMPUTED) or key.startswith(("model.vision_tower.post_layernorm.", "model.vision_tower.head.")):
        return True
    layer_prefix = "model.vision_tower.encoder.layers."
    return key.startswith(layer_prefix) and int(key.removeprefix(layer_prefix).split(".")[0]) >= num_layers


def read_named_tower(vision_tower: str, download: dict[str, Any]) -> dict[str, Weight]:
    """The weights of a CLIP or SigLIP repository under our names, without its text half."""
    return {
        f"model.vision_tower.{key.removeprefix('vision_model.')}": weight
        for key, weight in read_model(vision_tower, download).items()
        if key.startswith(("vision_model.", "embeddings.", "encoder.", "pre_layrnorm."))
    }


def add_base(delta: dict[str, Weight], base: dict[str, Weight]) -> dict[str, Weight]:
    """A delta plus its base; what only the delta has (the projector) is taken from it.

    Raises:
        ValueError: naming the weight whose shapes cannot be added.
    """
    total = {}
    for key, weight in delta.items():
        if key not in base:
            total[key] = weight
            continue
        shape, base_shape = weight.shape, base[key].shape
        grown = key in _TOKEN_MATRICES and shape[1:] == base_shape[1:] and shape[0] >= base_shape[0]
        if shape != base_shape and not grown:
            raise ValueError(
                f"got {key} of shape {shape} in {weight.file} and {base_shape} in {base[key].file}; expected equal "
                "shapes: this is not the base of this delta"
            )
        total[key] = replace(weight, data=Sum(weight, base[key]))
    return total


def grow_token_matrices(weights: dict[str, Weight], vocab_size: int) -> None:
    """Give a base model, in place, the rows of the tokens that the original added to it: the mean of the others."""
    for key in _TOKEN_MATRICES:
        if key in weights and weights[key].shape[0] < vocab_size:
            weights[key] = replace(weights[key], data=grow_rows(weights[key].data[...], vocab_size))


def complete_tower(state_dict: dict[str, torch.Tensor], source: OriginalFolder, vision_tower: str) -> None:
    """Make the tower of a state dict, in place, what the original folder that it comes from would hold.

    A tower that the folder only named and that is unchanged is left out; any other one gets back the weights that
    pruning removed, which the original code expects though it never uses them.

    Args:
        source: The folder that the model was loaded from.
        vision_tower: Folder or Hub id of the tower that it names.
    """
    weights = {}
    if has_model(source.name, source.download):
        read = _rename(read_model(source.name, source.download))
        weights = {key: item for key, item in read.items() if key.startswith(TOWER)}
    is_inside = bool(weights)
    weights = weights or read_named_tower(vision_tower, source.base_download)
    kept = {key: value for key, value in state_dict.items() if key.startswith(TOWER)}
    is_unchanged = all(torch.equal(value.cpu(), weights[key].data[...].to(value.dtype)) for key, value in kept.items())
    if is_unchanged and not is_inside:
        for key in kept:
            del state_dict[key]
        return
    dtype = next(iter(kept.values())).dtype
    for key in weights.keys() - kept.keys():
        state_dict[key] = weights[key].data[...].to(dtype)


def refuse_missing_source(source: OriginalFolder, vision_tower: str) -> None:
    """Refuse to save in the original layout what was loaded from a folder that is gone.

    Raises:
        ValueError: naming the folder.
    """
    for name in (source.name, vision_tower):
        if Path(name).is_absolute() and not Path(name).is_dir():
            raise ValueError(
                f"got a model loaded from {name}, which is no longer there; expected it, since the layout 'original' "
                "takes weights from it that the model does not use: save with layout='any_llava'"
            )
