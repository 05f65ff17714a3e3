"""config.json of the original LLaVA and of transformers' own classes <-> fields of AnyLlavaConfig.

What is surprising:
- The original writes the fields of the language model and of the LLaVA side by side; the tower is only named.
- Its SigLIP towers drop their last layer when they are built and ignore `mm_vision_select_layer`.
- LLaVAs on Gemma ran on a language model that scaled every input embedding, image features included.
"""

from typing import Any

from transformers import LlavaConfig, LlavaNextConfig, PreTrainedConfig

from processing_llava.model_parts import has_tokenizer, read_vision_config
from processing_llava.original_folder import OriginalFolder, is_original, override_tower, select_download
from processing_llava.original_processor import (
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
TRANSFORMERS_CONFIGS = {"llava": LlavaConfig, "llava_next": LlavaNextConfig}
"""transformers' own configurations that AnyLlavaConfig can express, by model_type."""


def find_layout(raw: dict[str, Any]) -> str:
    """The layout of a checkpoint by its config.json: "any_llava", "original" or "transformers".

    Raises:
        ValueError: for any other model.
    """
    if is_original(raw):
        return "original"
    if raw.get("model_type") in TRANSFORMERS_CONFIGS:
        return "transformers"
    # AnyLlavaConfig is also made from dicts without model_type.
    if raw.get("model_type", "any_llava") != "any_llava":
        raise ValueError(
            f"got a configuration with model_type={raw['model_type']!r}; expected one of an original LLaVA "
            f"(mm_vision_tower), {', '.join(TRANSFORMERS_CONFIGS)}, or any_llava"
        )
    return "any_llava"


def layout_of(config: PreTrainedConfig) -> str:
    """The layout of the checkpoint that an AnyLlavaConfig was read from."""
    return "any_llava" if config.source_config is None else find_layout(config.source_config)


def translate_config(
    raw: dict[str, Any], *, name: str, base_model: str | None = None, vision_tower: str | None = None, **kwargs
) -> dict[str, Any]:
    """A config.json of any layout -> the dict of an AnyLlavaConfig.

    Args:
        raw: The content of the file.
        name: Folder or Hub id that it comes from, where its other files are.
        base_model: Folder or Hub id of the language model, for checkpoints that hold none.
        vision_tower: Folder or Hub id of the tower, instead of the one that an original config.json names.
        **kwargs: Of `from_pretrained`; those about downloads are used.

    Raises:
        ValueError: if it is another model, or cannot be expressed.
    """
    layout = find_layout(raw)
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
    return {**fields, "model_type": "any_llava", "architectures": architectures, "source_config": raw}


def read_original_config(folder: OriginalFolder) -> dict[str, Any]:
    """The fields of AnyLlavaConfig for an original checkpoint.

    Raises:
        ValueError: naming the field of config.json that cannot be expressed, or the part that is missing.
    """
    raw = folder.config
    if raw.get("s2"):
        raise ValueError(f"got {folder.name} with s2=true; expected a tower that sees one scale")
    vision_config = read_vision_config(folder.vision_tower, **folder.base_download)
    if raw.get("mm_hidden_size", vision_config.hidden_size) != vision_config.hidden_size:
        raise ValueError(
            f"got {folder.name} with mm_hidden_size={raw['mm_hidden_size']} and vision tower {folder.vision_tower!r} "
            f"of size {vision_config.hidden_size}; expected equal sizes: check mm_vision_tower"
        )
    text_config = read_text_config(folder)
    # Without a tokenizer there is no processor either, which will say so; the model can still be loaded.
    image_token_id = text_config.vocab_size
    if has_tokenizer(folder.name, folder.download) or folder.base_name is not None:
        tokenizer = read_original_tokenizer(folder, text_config)
        # A processor that was saved beside original weights has given the image token its id.
        image_token_id = tokenizer.get_vocab().get("<image>", len(tokenizer))
        turn_end = TURN_END_TOKENS.get(infer_template(folder, tokenizer))
        turn_end_id = tokenizer.get_vocab().get(turn_end)
        text_config.eos_token_id = merge_ids(text_config.eos_token_id, tokenizer.eos_token_id, turn_end_id)
    is_siglip = vision_config.model_type == "siglip_vision_model"
    return {
        "vision_config": vision_config,
        "text_config": text_config,
        "image_token_id": image_token_id,
        "projector_type": raw.get("mm_projector_type") or "linear",
        "vision_feature_layer": SIGLIP_LAYER if is_siglip else raw.get("mm_vision_select_layer", -2),
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


def write_original_config(config: PreTrainedConfig) -> dict[str, Any]:
    """The config.json that the original LLaVA writes for this model, with the fields it was loaded from kept.

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
    if config.lm_head_bias:
        refuse("lm_head_bias", True, "original", "False")
    if config.scale_image_features != (text_config.model_type == "gemma"):
        refuse("scale_image_features", config.scale_image_features, "original", "True for Gemma, else False")
    if not vision_config.name_or_path:
        refuse("vision_config.name_or_path", vision_config.name_or_path, "original", "where the tower comes from")
    model_type, class_name = CLASS_OF_TEXT_MODEL[text_config.model_type]
    pinpoints = config.image_grid_pinpoints
    fields = {
        "mm_vision_tower": vision_config.name_or_path,
        "mm_hidden_size": vision_config.hidden_size,
        "mm_projector_type": config.projector_type,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": config.vision_feature_select_strategy,
        "mm_patch_merge_type": config.patch_merge_type,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "anyres" if pinpoints else "pad",
        "use_mm_proj": True,
    }
    if pinpoints:
        fields["image_grid_pinpoints"] = [[width, height] for height, width in pinpoints]
    dtype = str(config.dtype).removeprefix("torch.") if config.dtype is not None else None
    if layout_of(config) == "original":
        # What the folder said stays; a default that it left out stays out.
        fields = config.source_config | {"mm_vision_tower": vision_config.name_or_path}
        fields["torch_dtype"] = dtype
        return fields
    text_fields = text_config.to_dict()
    return {**text_fields, **fields, "model_type": model_type, "architectures": [class_name], "torch_dtype": dtype}


def read_transformers_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of AnyLlavaConfig for a checkpoint of transformers' `llava` or `llava_next`.

    Raises:
        ValueError: naming the field of config.json that cannot be expressed.
    """
    built_in = TRANSFORMERS_CONFIGS[raw["model_type"]].from_dict(dict(raw))
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
    return {
        "vision_config": built_in.vision_config,
        "text_config": built_in.text_config,
        "image_token_id": built_in.image_token_id,
        "projector_type": "mlp2x_gelu",
        "vision_feature_layer": built_in.vision_feature_layer,
        "vision_feature_select_strategy": strategies[built_in.vision_feature_select_strategy],
        "patch_merge_type": "spatial_unpad" if is_tiled else "flat",
        "image_grid_pinpoints": built_in.image_grid_pinpoints if is_tiled else None,
        "tie_word_embeddings": built_in.tie_word_embeddings,
        "dtype": built_in.dtype,
    }


def write_transformers_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with which transformers' own class computes the same.

    The tower is written as it is used: cut after the selected layer.

    Raises:
        ValueError: naming the field that transformers' classes cannot express.
    """
    if config.visual_tokens is not None:
        refuse("visual_tokens", config.visual_tokens, "transformers", "None")
    if config.projector_type != "mlp2x_gelu":
        refuse("projector_type", config.projector_type, "transformers", "'mlp2x_gelu'")
    if config.vision_config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        refuse("vision_config.model_type", config.vision_config.model_type, "transformers", "a CLIP or SigLIP tower")
    is_tiled = config.image_grid_pinpoints is not None
    if config.patch_merge_type != ("spatial_unpad" if is_tiled else "flat"):
        expected = "'spatial_unpad' with image_grid_pinpoints, or 'flat' without"
        refuse("patch_merge_type", config.patch_merge_type, "transformers", expected)
    if config.scale_image_features:
        refuse("scale_image_features", True, "transformers", "False")
    if config.lm_head_bias:
        refuse("lm_head_bias", True, "transformers", "False")
    is_clip = config.vision_config.model_type == "clip_vision_model"
    vision_fields = config.vision_config.to_dict()
    vision_fields["num_hidden_layers"] = max(config.vision_feature_layers)
    text_fields = config.text_config.to_dict()
    text_fields["vocab_size"] = max(config.text_config.vocab_size, config.image_token_id + 1)
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
        return LlavaNextConfig(architectures=["LlavaNextForConditionalGeneration"], **fields)
    return LlavaConfig(architectures=["LlavaForConditionalGeneration"], **fields)


def refuse(field: str, value: object, layout: str, expected: str) -> None:
    """Raise the error of a field that a layout has no place for."""
    raise ValueError(
        f"got {field}={value!r}, which the layout {layout!r} cannot express; expected {expected}: save with "
        "layout='any_llava'"
    )
