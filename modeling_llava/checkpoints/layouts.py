"""config.json of the original LLaVA and of transformers' own classes <-> fields of AnyLlavaConfig.

What is surprising:
- The original writes the fields of the language model and of the LLaVA side by side; the tower is only named.
- Its SigLIP towers drop their last layer when they are built and ignore `mm_vision_select_layer`.
- LLaVAs on Gemma ran on a language model that scaled every input embedding, image features included.
"""

from typing import Any

from transformers import LlavaConfig, LlavaNextConfig, PreTrainedConfig

from modeling_llava.configuration_llava import AnyLlavaConfig
from processing_llava.config_fields import check_sub_configs
from processing_llava.original.file_checks import select_download
from processing_llava.original.model_parts import has_tokenizer, read_vision_config
from processing_llava.original.model_types import TRANSFORMERS_CONFIGS
from processing_llava.original.older_versions import is_older, read_old_activation, scales_image_features
from processing_llava.original.original_folder import (
    OriginalFolder,
    check_fields,
    check_model_type,
    override_tower,
    read_built_in,
)
from processing_llava.original.original_processor import (
    TURN_END_TOKENS,
    infer_template,
    read_original_tokenizer,
    read_pinpoints,
    read_text_config,
)

SIGLIP_LAYER = -2
"""The last layer that the original keeps of a SigLIP tower."""
CLASS_OF_TEXT_MODEL = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "mixtral": ("llava_mixtral", "LlavaMixtralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
    "gemma": ("llava_gemma", "LlavaGemmaForCausalLM"),
}
"""model_type and class that the original gives a LLaVA on this text model."""


def translate_config(
    raw: dict[str, Any], *, name: str, base_model: str | None = None, vision_tower: str | None = None, **kwargs
) -> dict[str, Any]:
    """A config.json of any layout -> the dict of an AnyLlavaConfig.

    Args:
        raw: The content of the file.
        name: Folder or Hub id that it comes from, where its other files are.
        base_model: Folder or Hub id of the language model, for checkpoints that hold none.
        vision_tower: Folder or Hub id of the tower, instead of the one that an original config.json names.
        **kwargs: Arguments of `from_pretrained`; those about downloads are used.

    Raises:
        ValueError: if it is another model, or cannot be expressed.
    """
    layout = check_model_type(raw)
    if layout == "any_llava":
        return raw
    if layout == "transformers":
        fields = read_transformers_config(raw)
    else:
        raw = override_tower(raw, vision_tower)
        folder = OriginalFolder(name=name, config=raw, base_model=base_model, download=select_download(kwargs))
        fields = read_original_config(folder)
    # TRL looks the class up by its name.
    architectures = ["AnyLlavaForConditionalGeneration"]
    return {**fields, "model_type": "any_llava", "architectures": architectures}


def read_original_config(folder: OriginalFolder) -> dict[str, Any]:
    """The fields of AnyLlavaConfig for an original checkpoint.

    Raises:
        ValueError: naming the field of config.json that cannot be expressed, or the part that is missing.
    """
    raw = folder.config
    check_fields(folder)
    vision_config = read_vision_config(folder.vision_tower, **folder.base_download)
    if raw.get("mm_hidden_size", vision_config.hidden_size) != vision_config.hidden_size:
        raise ValueError(
            f"got {folder.name} with mm_hidden_size={raw['mm_hidden_size']} and vision tower {folder.vision_tower!r} "
            f"of size {vision_config.hidden_size}; expected equal sizes: check mm_vision_tower"
        )
    fields = read_original_fields(folder, vision_config)
    # Without a tokenizer there is no processor either, which will say so; the model can still be loaded.
    if has_tokenizer(folder.name, folder.download) or folder.base_name is not None:
        text_config = fields["text_config"]
        tokenizer = read_original_tokenizer(folder, text_config)
        if "image_token_id" not in raw:
            # A processor that was saved beside original weights has given the image token its id.
            fields["image_token_id"] = tokenizer.get_vocab().get("<image>", len(tokenizer))
        turn_end = TURN_END_TOKENS.get(infer_template(folder, tokenizer))
        turn_end_id = tokenizer.get_vocab().get(turn_end)
        text_config.eos_token_id = merge_ids(text_config.eos_token_id, tokenizer.eos_token_id, turn_end_id)
    return fields


def read_original_fields(folder: OriginalFolder, vision_config: PreTrainedConfig) -> dict[str, Any]:
    """What config.json of an original checkpoint alone says of the fields of AnyLlavaConfig, for this tower.

    Raises:
        ValueError: naming the field of config.json that cannot be expressed.
    """
    raw = folder.config
    layer = raw.get("mm_vision_select_layer", -2)
    if type(layer) is not int:
        raise ValueError(f"got {folder.name} with mm_vision_select_layer={layer!r}; expected one integer")
    text_config = read_text_config(folder)
    is_siglip = vision_config.model_type == "siglip_vision_model"
    return {
        "vision_config": vision_config,
        "text_config": text_config,
        "image_token_id": raw.get("image_token_id", text_config.vocab_size),
        "projector_type": raw.get("mm_projector_type") or "linear",
        "vision_feature_layer": SIGLIP_LAYER if is_siglip else layer,
        "vision_feature_select_strategy": raw.get("mm_vision_select_feature") or "patch",
        "patch_merge_type": raw.get("mm_patch_merge_type") or "flat",
        "image_grid_pinpoints": read_pinpoints(folder, tile_size=vision_config.image_size),
        "scale_image_features": text_config.model_type == "gemma",
        "dtype": raw.get("torch_dtype") or raw.get("dtype"),
    }


def merge_ids(*ids: int | list[int] | None) -> int | list[int] | None:
    """All the ids once, in order: one id as itself, as configurations write it."""
    flat = [item for entry in ids if entry is not None for item in (entry if isinstance(entry, list) else [entry])]
    unique = list(dict.fromkeys(flat))
    return unique[0] if len(unique) == 1 else unique or None


def write_original_config(config: PreTrainedConfig, *, source: OriginalFolder | None = None) -> dict[str, Any]:
    """The config.json that the original LLaVA writes for this model.

    Args:
        config: The model's.
        source: The original folder that it was loaded from: what that said stays, where it still says the same, and a
            default that it left out stays out.

    Raises:
        ValueError: naming the field that the original layout cannot express.
    """
    text_config, vision_config = config.text_config, config.vision_config
    if config.visual_tokens is not None:
        refuse("visual_tokens", config.visual_tokens, "original", "None")
    if text_config.model_type not in CLASS_OF_TEXT_MODEL:
        refuse("text_config.model_type", text_config.model_type, "original", ", ".join(CLASS_OF_TEXT_MODEL))
    if vision_config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        refuse("vision_config.model_type", vision_config.model_type, "original", "a CLIP or SigLIP tower")
    if len(config.vision_feature_layers) > 1:
        refuse("vision_feature_layer", config.vision_feature_layer, "original", "one layer")
    tower = vision_config.name_or_path
    if not tower:
        refuse("vision_config.name_or_path", tower, "original", "where the tower comes from")
    download = {} if source is None else source.base_download
    named_config = read_vision_config(tower, **download)
    _refuse_differences("vision_config", vision_config, named_config, "original")

    fields = _name_original_fields(config)
    if source is not None:
        before = _name_original_fields(AnyLlavaConfig(**read_original_fields(source, vision_config)))
        # Reading adds what ends an answer of the conversation format.
        changed = {name for name in fields if name not in before or fields[name] != before[name]} - {"eos_token_id"}
        if changed & _ROPE_FIELDS:
            changed |= _ROPE_FIELDS
        kept = {name: value for name, value in source.config.items() if name not in _WRITTEN_ANEW}
        if changed & _ROPE_FIELDS:
            kept.pop("rope_parameters", None)
        fields = kept | {name: fields[name] for name in changed}
    if config.image_token_id != text_config.vocab_size:
        # Of ours: where it is missing, the tokenizer tells, or the vocabulary of the language model.
        fields["image_token_id"] = config.image_token_id
    fields["mm_vision_tower"] = tower
    fields["torch_dtype"] = None if config.dtype is None else str(config.dtype).removeprefix("torch.")
    written = read_original_fields(OriginalFolder(name="config.json", config=fields), vision_config)
    refuse_differences(config, AnyLlavaConfig(**written), "original", may_differ={"eos_token_id"})
    return fields


_ROPE_FIELDS = {"rope_theta", "rope_scaling"}
_WRITTEN_ANEW = ("image_token_id", "dtype", "quantization_config")


def _name_original_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """What the original calls the fields of a configuration, in the words of its version of transformers."""
    text_fields = config.text_config.to_dict()
    for name in ("dtype", "transformers_version", "_name_or_path"):
        text_fields.pop(name, None)
    rope = dict(text_fields.pop("rope_parameters", None) or {})
    text_fields["rope_theta"] = rope.pop("rope_theta", None)
    rope_type = rope.pop("rope_type", "default")
    text_fields["rope_scaling"] = None if rope_type == "default" else {"type": rope_type, **rope}
    model_type, class_name = CLASS_OF_TEXT_MODEL[config.text_config.model_type]
    pinpoints = config.image_grid_pinpoints
    return text_fields | {
        "model_type": model_type,
        "architectures": [class_name],
        "tie_word_embeddings": config.tie_word_embeddings,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": config.projector_type,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": config.vision_feature_select_strategy,
        "mm_patch_merge_type": config.patch_merge_type,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "anyres" if pinpoints else "pad",
        "image_grid_pinpoints": [[width, height] for height, width in pinpoints] if pinpoints else None,
        "use_mm_proj": True,
    }


def read_transformers_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of AnyLlavaConfig for a checkpoint of transformers' `llava` or `llava_next`.

    Raises:
        ValueError: naming the field of config.json that cannot be expressed.
    """
    check_sub_configs(raw, required=("text_config",))
    built_in = _read_as_written(raw)
    text_config = built_in.text_config
    if built_in.projector_hidden_act != "gelu":
        raise ValueError(f"got projector_hidden_act={built_in.projector_hidden_act!r}; expected 'gelu'")
    if not built_in.multimodal_projector_bias:
        raise ValueError("got multimodal_projector_bias=False; expected True")
    if (
        built_in.vision_config.model_type == "siglip_vision_model"
        and built_in.vision_feature_select_strategy != "full"
    ):
        raise ValueError(
            "got vision_feature_select_strategy='default' with a SigLIP tower, which drops a patch; expected 'full'"
        )
    is_tiled = built_in.model_type == "llava_next"
    strategies = {"default": "patch", "full": "cls_patch"}
    if built_in.vision_feature_select_strategy not in strategies:
        raise ValueError(
            f"got vision_feature_select_strategy={built_in.vision_feature_select_strategy!r}; expected one of "
            f"{', '.join(strategies)}"
        )
    return {
        "vision_config": built_in.vision_config,
        "text_config": text_config,
        "image_token_id": built_in.image_token_id,
        "projector_type": "mlp2x_gelu",
        "vision_feature_layer": built_in.vision_feature_layer,
        "vision_feature_select_strategy": strategies[built_in.vision_feature_select_strategy],
        "patch_merge_type": "spatial_unpad" if is_tiled else "flat",
        "image_grid_pinpoints": built_in.image_grid_pinpoints if is_tiled else None,
        "scale_image_features": scales_image_features(raw, text_config.model_type),
        "tie_word_embeddings": built_in.tie_word_embeddings,
        "dtype": built_in.dtype,
    }


def _read_as_written(raw: dict[str, Any]) -> PreTrainedConfig:
    """transformers' own configuration, with the fields as the version meant them that wrote the file."""
    text_fields = raw.get("text_config") or {}
    config = read_built_in(raw | {"text_config": text_fields | read_old_activation(raw, text_fields)})
    if is_older(raw, 5, 0):
        # transformers 4 read the field of the text model, whatever stood beside it.
        config.tie_word_embeddings = config.text_config.tie_word_embeddings
    return config


def find_changed_fields(raw: dict[str, Any], *, has_output_layer: bool) -> list[str]:
    """Fields of a config.json of transformers' own layout that its present class reads otherwise than its writer did.

    Args:
        has_output_layer: Whether the weights hold one. transformers 4 did not use it where it was tied to the input
            embeddings; transformers 5 does.
    """
    written, read = _read_as_written(raw), TRANSFORMERS_CONFIGS[raw["model_type"]].from_dict(dict(raw))
    changed = []
    if scales_image_features(raw, written.text_config.model_type):
        changed.append("the factor of image features")
    is_tied = written.tie_word_embeddings
    if is_tied != read.tie_word_embeddings or (is_tied and has_output_layer and is_older(raw, 5, 0)):
        changed.append("tie_word_embeddings")
    if written.text_config.to_dict().get("hidden_act") != read.text_config.to_dict().get("hidden_act"):
        changed.append("text_config.hidden_act")
    return changed


def restore_written(config: PreTrainedConfig, stored: dict[str, Any]) -> dict[str, Any]:
    """The config.json that a configuration of transformers was read from, with what was changed in it since.

    A configuration forgets which version wrote its file, and with it what the fields meant.
    """
    read = type(config).from_dict(dict(stored)).to_dict()

    def restore(stored: dict[str, Any], read: dict[str, Any], present: dict[str, Any]) -> dict[str, Any]:
        changed = {}
        for name, value in present.items():
            if isinstance(value, dict) and isinstance(read.get(name), dict):
                changed[name] = restore(stored.get(name) or {}, read[name], value)
            elif value != read.get(name):
                changed[name] = value
        return stored | changed

    return restore(stored, read, config.to_dict())


def write_transformers_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with which transformers' own class computes the same.

    The tower is written as it is used: cut after the selected layer.

    Raises:
        ValueError: naming the field that transformers' classes cannot express.
    """
    if config.vision_config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        refuse("vision_config.model_type", config.vision_config.model_type, "transformers", "a CLIP or SigLIP tower")
    is_tiled = config.image_grid_pinpoints is not None
    is_clip = config.vision_config.model_type == "clip_vision_model"
    # Without the paths of this machine.
    parts = config.to_dict()
    vision_fields, text_fields = parts["vision_config"], parts["text_config"]
    vision_fields["num_hidden_layers"] = max(config.vision_feature_layers)
    text_fields["vocab_size"] = max(config.text_config.vocab_size, config.image_token_id + 1)
    text_fields["tie_word_embeddings"] = config.tie_word_embeddings
    if not is_clip:
        vision_fields["vision_use_head"] = False
    layers = config.vision_feature_layers
    drops_class_token = is_clip and config.vision_feature_select_strategy == "patch"
    fields = {
        "vision_config": vision_fields,
        "text_config": text_fields,
        "image_token_index": config.image_token_id,
        "vision_feature_layer": layers if isinstance(config.vision_feature_layer, list) else -1,
        # "default" drops the first token of any tower; SigLIP has none to spare.
        "vision_feature_select_strategy": "default" if drops_class_token else "full",
        "image_seq_length": config.patches_per_side**2 + config.num_prefix_tokens,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": config.dtype,
    }
    if is_tiled:
        fields["image_grid_pinpoints"] = config.image_grid_pinpoints
        built_in = LlavaNextConfig(architectures=["LlavaNextForConditionalGeneration"], **fields)
    else:
        built_in = LlavaConfig(architectures=["LlavaForConditionalGeneration"], **fields)
    written = AnyLlavaConfig(**read_transformers_config(built_in.to_dict()))
    # A row for the image token, and a tower that ends where ours does.
    may_differ = {"vocab_size", "num_hidden_layers", "vision_use_head"}
    refuse_differences(config, written, "transformers", may_differ=may_differ)
    return built_in


_COMPARED = {
    "image_token_id": "image_token_id",
    "projector_type": "projector_type",
    "vision_feature_layer": "vision_feature_layers",
    "vision_feature_select_strategy": "num_prefix_tokens",
    "patch_merge_type": "patch_merge_type",
    "image_grid_pinpoints": "image_grid_pinpoints",
    "visual_tokens": "visual_tokens",
    "scale_image_features": "scale_image_features",
    "lm_head_bias": "lm_head_bias",
    "tie_word_embeddings": "tie_word_embeddings",
}
"""The fields of AnyLlavaConfig that decide what is computed, and in what they are to be equal."""
_NOT_COMPARED = {"architectures", "dtype", "transformers_version", "_name_or_path", "tie_word_embeddings"}


_BUILT = {
    "projector_type": lambda config: config.projector_type,
    "vision_feature_layer": lambda config: config.vision_feature_layers,
    "patch_merge_type": lambda config: config.patch_merge_type == "spatial_unpad",
    "lm_head_bias": lambda config: config.lm_head_bias,
}
"""The fields of AnyLlavaConfig that decide which modules a model has, and what they depend on."""
_READ_LATER = {
    "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "eos_token_id", "id2label", "is_encoder_decoder",
    "label2id", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "problem_type",
    "return_dict", "use_cache", "vocab_size",
}  # fmt: skip
"""Fields of language models and towers that decide training, output or generation alone, and the one that
`resize_token_embeddings` sets."""


def refuse_changes(config: PreTrainedConfig, built: PreTrainedConfig) -> None:
    """Refuse to write a configuration that was changed where its model, once built, computes as before.

    Args:
        config: The model's.
        built: What it was when the model was built.

    Raises:
        ValueError: naming the first field.
    """
    changed = []
    for part in ("text_config", "vision_config"):
        present, past = getattr(config, part), getattr(built, part)
        names = type(past)().to_dict().keys() - _NOT_COMPARED - _READ_LATER
        found, expected = present.to_dict(), past.to_dict()
        changed += [(present, past, name) for name in sorted(names) if found.get(name) != expected.get(name)]
    changed += [(config, built, name) for name, read in _BUILT.items() if read(config) != read(built)]
    if changed:
        present, past, name = changed[0]
        raise ValueError(
            f"got {name}={getattr(present, name)!r} in the configuration of a model that was built with "
            f"{getattr(past, name)!r}, and computes so; expected the latter: set it before the model is loaded"
        )


def refuse_differences(
    config: PreTrainedConfig, written: PreTrainedConfig, layout: str, *, may_differ: set[str] = frozenset()
) -> None:
    """Refuse a model that a layout would give back as another one.

    Args:
        config: The model's.
        written: What is read of the config.json that was written for it.
        layout: That of the file.
        may_differ: Fields of the language model and the tower that need not be equal.

    Raises:
        ValueError: naming the first field.
    """
    for field, compared in _COMPARED.items():
        if getattr(config, compared) != getattr(written, compared):
            refuse(field, getattr(config, field), layout, repr(getattr(written, field)))
    for part in ("text_config", "vision_config"):
        _refuse_differences(part, getattr(config, part), getattr(written, part), layout, may_differ=may_differ)


def _refuse_differences(
    part: str, config: PreTrainedConfig, written: PreTrainedConfig, layout: str, *, may_differ: set[str] = frozenset()
) -> None:
    found, expected = config.to_dict(), written.to_dict()
    # Other fields than those of its class have no effect.
    for name in type(config)().to_dict().keys() - _NOT_COMPARED - may_differ:
        if found.get(name) != expected.get(name):
            refuse(f"{part}.{name}", found.get(name), layout, repr(expected.get(name)))


def refuse(field: str, value: object, layout: str, expected: str) -> None:
    """Raise the error of a field that a layout has no place for."""
    raise ValueError(
        f"got {field}={value!r}, which the layout {layout!r} cannot express; expected {expected}: save with "
        "layout='any_llava'"
    )
