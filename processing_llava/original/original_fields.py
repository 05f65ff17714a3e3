"""Fields of an original config.json: which are read, which change nothing, which are of other kinds of models."""

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from .original_folder import OriginalFolder

logger = logging.get_logger(__name__)

# fmt: off
READ_FIELDS = {
    "architectures", "dtype", "hidden_activation", "image_aspect_ratio", "image_grid_pinpoints", "image_token_id",
    "mm_hidden_size", "mm_patch_merge_type", "mm_projector_type", "mm_use_im_patch_token", "mm_use_im_start_end",
    "mm_vision_select_feature", "mm_vision_select_layer", "mm_vision_tower", "model_type", "quantization_config",
    "rope_scaling", "rope_theta", "torch_dtype", "transformers_version",
}
"""Beside those of the language model."""
INERT_FIELDS = {
    "_attn_implementation", "_flash_attn_2_enabled", "_name_or_path", "add_cross_attention", "attn_implementation",
    "auto_map", "chunk_size_feed_forward", "delay_load", "faster_token_stride", "freeze_backbone",
    "freeze_mm_mlp_adapter", "freeze_mm_vision_resampler", "image_crop_resolution", "image_split_resolution",
    "max_sequence_length", "mm_mask_drop_mode", "mm_mask_drop_ratio", "mm_mask_drop_ratio_lower",
    "mm_mask_drop_ratio_upper", "mm_mask_drop_skip_percentage", "mm_perceiver_depth", "mm_perceiver_ff_mult",
    "mm_perceiver_latents", "mm_perceiver_pretrained", "mm_projector_lr", "mm_qformer_depth", "mm_qformer_latents",
    "mm_qformer_pretrained", "mm_tunable_parts", "mm_vision_tower_lr", "pos_skipping_range", "pretrain_mm_mlp_adapter",
    "pretraining_tp", "s2_scales", "tokenizer_model_max_length", "tokenizer_padding_side", "tune_mm_mlp_adapter",
    "tune_mm_vision_resampler", "unfreeze_mm_vision_tower", "use_mm_proj", "use_pos_skipping",
    "vision_tower_pretrained",
}
"""Of training, of files, or without effect where no field of another kind has a value."""
OTHER_KINDS = {
    "add_faster_video": (False,), "add_time_instruction": (False,), "force_sample": (False,),
    "image_projector_type": (), "image_tower": (), "mm_image_tower": (), "mm_newline_position": ("one_token",),
    "mm_resampler_type": (), "mm_spatial_pool_mode": (), "mm_spatial_pool_out_channels": (),
    "mm_spatial_pool_stride": (), "mm_video_tower": (), "mm_vision_tower_aux": (), "moe": (), "moe_enable": (False,),
    "s2": (False,), "video_tower": (),
}
"""Fields of models that see video, mix experts, resample or scale, with the values that no such model has; None and
empty ones are further ones."""
# fmt: on


def check_fields(folder: OriginalFolder) -> None:
    """Refuse a model of another kind, which would load as one that sees pictures and computes something else.

    Raises:
        ValueError: naming the field.
    """
    text_fields = AutoConfig.for_model(folder.text_model_type).to_dict()
    known = {*text_fields, *GenerationConfig().to_dict(), *PreTrainedConfig().to_dict()} | READ_FIELDS | INERT_FIELDS
    unknown = []
    for field, value in folder.config.items():
        if field in known or not value or value in OTHER_KINDS.get(field, ()):
            continue
        if field in OTHER_KINDS or field.startswith("mm_"):
            raise ValueError(
                f"got {folder.name} with {field}={value!r}, which is not computed here; expected a LLaVA that sees "
                "pictures, with one tower, a projector and a dense language model: take another checkpoint"
            )
        unknown.append(field)
    if unknown:
        logger.warning(f"{folder.name}: config.json holds {', '.join(unknown)}, of which nothing is known; no effect")
