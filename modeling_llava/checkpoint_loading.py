"""`from_pretrained` and `save_pretrained` for every layout that a LLaVA was ever published in.

Loading an original checkpoint, in this order:
1. the language model: the folder's own, or the base model's where the folder has none (LoRA, projector only), or the
   sum of both (delta);
2. what the folder trained beside it: projector, newline, token embeddings;
3. the tower: the folder's own if it has one, else the one that config.json names;
4. everything under our names goes to transformers as one state dict whose tensors are not read yet;
5. a LoRA adapter is attached and merged, or kept.

What is surprising: weights that the pruned tower does not need are not loaded. Saving in the original layout takes
them from the source again, and leaves the tower out if it is still the named one.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from processing_llava.original_folder import DOWNLOAD_KWARGS, OriginalFolder, find_file

from .checkpoint_layouts import (
    add_transformers_only_weights,
    check_layout,
    grow_rows,
    rename_from_ours,
    rename_to_ours,
)
from .original_layout import layout_of, merge_ids, translate_config, write_original_config, write_transformers_config
from .weight_files import Sum, Weight, find_base_dtype, has_model, read_file, read_model

logger = logging.get_logger(__name__)

# Arguments of from_pretrained that are attributes of configurations too.
_NOT_FOR_CONFIG = ("dtype", "torch_dtype", "attn_implementation", "quantization_config")
_TOWER = "model.vision_tower."
_TOKEN_MATRICES = ("model.language_model.embed_tokens.weight", "lm_head.weight")


class CheckpointMixin:
    """Reads and writes the layouts of other code; to be listed before PreTrainedModel."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | None,
        *model_args,
        config: PreTrainedConfig | None = None,
        base_model: str | None = None,
        merge_adapter: bool = True,
        **kwargs,
    ) -> PreTrainedModel:
        """As in transformers, for checkpoints in any layout.

        Args:
            pretrained_model_name_or_path: Folder or Hub id: a model of ours, of transformers' `llava` or `llava_next`,
                or of the original LLaVA (complete, LoRA, projector only, delta).
            base_model: Folder or Hub id of the language model, for an original folder that does not say its own. With
                a complete model, that one is a delta to add to it.
            merge_adapter: Add an original LoRA to the weights; False keeps it as an adapter of PEFT.

        Raises:
            ValueError: naming file, weight, and expected and found shape, if something does not fit.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        name = str(pretrained_model_name_or_path)
        download = {key: kwargs[key] for key in DOWNLOAD_KWARGS if kwargs.get(key) is not None}
        given_config = config
        if not isinstance(config, cls.config_class):
            held = {key: kwargs.pop(key) for key in _NOT_FOR_CONFIG if key in kwargs}
            original_kwargs = dict(kwargs)
            raw, kwargs = PreTrainedConfig.get_config_dict(name if config is None else config, **kwargs)
            translated = translate_config(raw, name=name, base_model=base_model, **download)
            config, kwargs = cls.config_class.from_dict(translated, return_unused_kwargs=True, **kwargs)
            kwargs = (original_kwargs if layout_of(config) == "any_llava" else kwargs) | held
        if layout_of(config) == "any_llava":
            return super().from_pretrained(name, *model_args, config=given_config, **kwargs)

        kwargs = {key: value for key, value in kwargs.items() if key not in (*DOWNLOAD_KWARGS, "adapter_kwargs")}
        folder = OriginalFolder(name=name, config=config.source_config, base_model=base_model, download=download)
        is_original = layout_of(config) == "original"
        if is_original:
            weights = gather_original_weights(folder, config)
        else:
            weights = {rename_to_ours(key, "transformers"): item for key, item in read_model(name, download).items()}
        config.dtype = config.dtype or find_base_dtype(weights)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            None,
            *model_args,
            config=config,
            state_dict={key: item.data for key, item in weights.items()},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kwargs,
        )
        refuse_unfit(info, weights, name)
        model.config.name_or_path = name
        if model.can_generate():
            model.generation_config = read_generation_config(name, config, download)
        if is_original and find_file(name, "adapter_config.json", download) is not None:
            from .adapters import load_original_adapter

            model = load_original_adapter(model, folder, merge=merge_adapter)
        return (model, info) if wants_info else model

    def save_pretrained(
        self, save_directory: str | Path, *args, layout: str | None = None, state_dict: dict | None = None, **kwargs
    ) -> None:
        """As in transformers, in a layout of choice.

        Args:
            layout: "any_llava", "original" (that of haotian-liu/LLaVA) or "transformers" (that of transformers' own
                `llava` and `llava_next`). Default: the layout that was loaded.

        Raises:
            ValueError: naming the field that the layout cannot express.
        """
        layout = layout or layout_of(self.config)
        check_layout(layout)
        kwargs["save_original_format"] = False
        if layout == "any_llava" or getattr(self, "_hf_peft_config_loaded", False):
            return super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        if self.base_model is self:
            raise ValueError(
                f"got a {type(self).__name__}, which has no output layer; expected a model with one to write the "
                f"layout {layout!r}"
            )
        state_dict = dict(self.state_dict() if state_dict is None else state_dict)
        if self.config.tie_word_embeddings:
            state_dict.pop("lm_head.weight", None)
        if layout == "original":
            written_config = write_original_config(self.config)
            complete_tower(state_dict, self.config)
            if any(key.startswith(_TOWER) for key in state_dict):
                written_config["unfreeze_mm_vision_tower"] = True
        else:
            built_in = write_transformers_config(self.config)
            add_transformers_only_weights(
                state_dict,
                vocab_size=built_in.text_config.vocab_size,
                vision_size=built_in.vision_config.hidden_size,
            )
            written_config = built_in.to_dict()
        renamed = {rename_from_ours(key, layout): value for key, value in state_dict.items()}
        super().save_pretrained(save_directory, *args, state_dict=renamed, **kwargs)
        text = json.dumps(written_config, indent=2, sort_keys=True) + "\n"
        (Path(save_directory) / "config.json").write_text(text, encoding="utf-8")


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
    if any(key.startswith(_TOWER) for key in weights):
        parts.append("vision tower of the checkpoint")
    else:
        weights |= read_named_tower(folder.vision_tower, folder.base_download)
        parts.append(f"vision tower of {folder.vision_tower}")
    logger.warning(f"{folder.name}: {', '.join(parts)}")
    return {key: weight for key, weight in weights.items() if _is_used(key, config)}


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


def _is_used(key: str, config: PreTrainedConfig) -> bool:
    """Whether a weight has a place: not what pruning removes from a tower, nor buffers that are computed today."""
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
        shape, base_shape = list(weight.data[:].shape), list(base[key].data[:].shape)
        grown = key in _TOKEN_MATRICES and shape[1:] == base_shape[1:] and shape[0] >= base_shape[0]
        if shape != base_shape and not grown:
            raise ValueError(
                f"got {key} of shape {shape} in {weight.file} and {base_shape} in {base[key].file}; expected equal "
                "shapes: this is not the base of this delta"
            )
        total[key] = Weight(weight.file, weight.key, Sum(weight, base[key]))
    return total


def grow_token_matrices(weights: dict[str, Weight], vocab_size: int) -> None:
    """Give a base model, in place, the rows of the tokens that the original added to it: the mean of the others."""
    for key in _TOKEN_MATRICES:
        if key in weights and len(weights[key].data[:]) < vocab_size:
            weight = weights[key]
            weights[key] = Weight(weight.file, weight.key, grow_rows(weight.data[...], vocab_size))


def refuse_unfit(info: dict[str, Any], weights: dict[str, Weight], name: str) -> None:
    """Refuse a model of which a part was not loaded.

    Raises:
        ValueError: naming file, weight and shapes.
    """
    for key, found, expected in sorted(info["mismatched_keys"]):
        weight = weights[key]
        raise ValueError(
            f"got {weight.key} of shape {list(found)} in {weight.file}; expected {list(expected)} as config.json of "
            f"{name} says: this weight belongs to another model"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"got {name} without {len(missing)} weights, {missing[0]} among them; expected all: a file is incomplete "
            "or of another model"
        )


def read_generation_config(name: str, config: PreTrainedConfig, download: dict[str, Any]) -> GenerationConfig:
    """The generation settings of a checkpoint, which also stop at the token that ends an answer in its format."""
    if find_file(name, "generation_config.json", download) is not None:
        settings = GenerationConfig.from_pretrained(name, **download)
    else:
        settings = GenerationConfig.from_model_config(config)
    settings.eos_token_id = merge_ids(settings.eos_token_id, config.text_config.eos_token_id)
    return settings


def complete_tower(state_dict: dict[str, torch.Tensor], config: PreTrainedConfig) -> None:
    """Make the tower of a state dict, in place, what the original folder that it comes from would hold.

    A tower that the folder only named and that is unchanged is left out; any other one gets back the weights that
    pruning removed, which the original code expects though it never uses them.
    """
    if layout_of(config) != "original":
        return
    folder = OriginalFolder(name=config.name_or_path, config=config.source_config)
    source = {}
    if has_model(folder.name, {}):
        source = {key: item for key, item in _rename(read_model(folder.name, {})).items() if key.startswith(_TOWER)}
    is_inside = bool(source)
    source = source or read_named_tower(folder.vision_tower, {})
    kept = {key: value for key, value in state_dict.items() if key.startswith(_TOWER)}
    is_unchanged = all(torch.equal(value.cpu(), source[key].data[...].to(value.dtype)) for key, value in kept.items())
    if is_unchanged and not is_inside:
        for key in kept:
            del state_dict[key]
        return
    dtype = next(iter(kept.values())).dtype
    for key in source.keys() - kept.keys():
        state_dict[key] = source[key].data[...].to(dtype)
