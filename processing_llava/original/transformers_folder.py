"""The parts of our processor from a folder of transformers' own `llava` and `llava_next`.

What is surprising: their processor keeps values of its own that the model has too (patch size, strategy, sizes of
tiles). Here the configuration of the model decides, and a processor that contradicts it is refused.
"""

from typing import Any

from transformers import AutoProcessor, LlavaConfig, LlavaNextConfig

from .model_parts import read_image_fields

TRANSFORMERS_TYPES = {"llava": LlavaConfig, "llava_next": LlavaNextConfig}


def read_transformers_parts(name: str, raw: dict[str, Any], download: dict[str, Any]) -> dict[str, Any]:
    """The arguments of AnyLlavaProcessor.

    Args:
        name: Folder or Hub id.
        raw: Its config.json.
        download: Some of `DOWNLOAD_KWARGS`.

    Raises:
        ValueError: naming the values in which its processor contradicts its model.
    """
    config = TRANSFORMERS_TYPES[raw["model_type"]].from_dict(dict(raw))
    theirs = AutoProcessor.from_pretrained(name, backend="pil", **download)
    if theirs.image_token_id != config.image_token_id:
        raise ValueError(
            f"got {name} with image_token_index={config.image_token_id} in config.json, and a tokenizer that gives "
            f"{theirs.image_token!r} the id {theirs.image_token_id}; expected equal ids: correct one of them"
        )
    fields = theirs.image_processor.to_dict()
    is_tiled = config.model_type == "llava_next"
    pinpoints = config.image_grid_pinpoints if is_tiled else None
    if is_tiled:
        stored = fields.get("image_grid_pinpoints")
        if stored is not None and [list(size) for size in stored] != [list(size) for size in pinpoints]:
            raise ValueError(
                f"got {name} with image_grid_pinpoints {pinpoints} in config.json and {stored} in its image "
                "processor; expected equal ones: correct one of them"
            )
        image_aspect_ratio = "anyres"
    else:
        image_aspect_ratio = "pad" if fields.get("do_pad") else "square"
    is_clip = config.vision_config.model_type == "clip_vision_model"
    return {
        "image_processor": read_image_fields(
            fields, image_aspect_ratio=image_aspect_ratio, image_grid_pinpoints=pinpoints
        ),
        "tokenizer": theirs.tokenizer,
        "chat_template": theirs.chat_template,
        "patch_size": config.vision_config.patch_size,
        "num_prefix_tokens": int(is_clip and config.vision_feature_select_strategy == "full"),
        "patch_merge_type": "spatial_unpad" if is_tiled else "flat",
        "image_token": theirs.image_token,
    }
