"""The weights of an original checkpoint, gathered from its parts, under our names.

1. The language model: the folder's own, or the base model's where the folder has none (LoRA, projector only), or the
   sum of both (delta).
2. What the folder trained beside it: projector, newline, token embeddings.
3. The tower: the folder's own if it has one, else the one that config.json names.

What is surprising: weights that the pruned tower does not need are not loaded. Saving in the original layout takes
them from the source again, and leaves the tower out if it is still the named one.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from processing_llava.original_folder import OriginalFolder, find_file

from .checkpoint_layouts import grow_rows, rename_to_ours
from .weight_files import Sum, Weight, has_model, read_file, read_model

logger = logging.get_logger(__name__)

TOWER = "model.vision_tower."
_TOKEN_MATRICES = ("model.language_model.embed_tokens.weight", "lm_head.weight")


def gather_original_weights(folder: OriginalFolder, config: PreTrainedConfig) -> dict[str, Weight]:
    """All weights of an original checkpoint under our names.

    Raises:
        ValueError: if a part is missing or cannot be read.
    """
    weights = {}
    parts = []
    if has_model(folder.name, folder.download):
        weights = _rename(read_model(folder.name, folder.download))
        parts.append(f"language model of {folder.name}")
        if folder.base_model is not None:
            weights = add_base(weights, _rename(read_model(folder.base_name, folder.base_download)))
            parts[-1] = f"sum of the delta {folder.name} and {folder.base_name}"
    else:
        if folder.base_name is None:
            raise ValueError(
                f"got {folder.name}, which holds no language model and does not say which it was trained on; expected "
                "base_model=: the folder or Hub id of that model"
            )
        weights = _rename(read_model(folder.base_name, folder.base_download))
        for filename in ("mm_projector.bin", "non_lora_trainables.bin"):
            path = find_file(folder.name, filename, folder.download)
            if path is not None:
                weights |= _rename(read_file(path))
                parts.append(filename)
        parts.insert(0, f"language model of {folder.base_name}")
        grow_token_matrices(weights, config.text_config.vocab_size)
    if any(key.startswith(TOWER) for key in weights):
        parts.append("vision tower of the checkpoint")
    else:
        weights |= read_named_tower(folder.vision_tower, folder.base_download)
        parts.append(f"vision tower of {folder.vision_tower}")
    logger.warning(f"{folder.name}: {', '.join(parts)}")
    return {key: weight for key, weight in weights.items() if is_used(key, config)}


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
    if key.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):
        return False
    if key == "model.image_newline":
        return config.patch_merge_type == "spatial_unpad"
    if key == "lm_head.weight" and config.tie_word_embeddings:
        return False
    if key.startswith(("model.vision_tower.post_layernorm.", "model.vision_tower.head.")):
        return False
    layer_prefix = "model.vision_tower.encoder.layers."
    if key.startswith(layer_prefix):
        return int(key.removeprefix(layer_prefix).split(".")[0]) < max(config.vision_feature_layers)
    return True


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
