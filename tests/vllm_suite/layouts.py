"""Models that only our layout expresses, as vLLM serves them on a CPU: its attention takes no heads under 64."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration
from tests.original_folders import widen
from tests.tiny import PATCH_SIZE, PINPOINTS, TILE_SIZE, VOCAB_SIZE, tiny_processor

_TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 64}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": TILE_SIZE,
    "patch_size": PATCH_SIZE,
}
_TILES = {"image_grid_pinpoints": PINPOINTS}
_ANYRES = {"image_aspect_ratio": "anyres", **_TILES}

LAYOUTS: dict[str, tuple[PreTrainedConfig, PreTrainedConfig, dict[str, Any], dict[str, Any]]] = {
    "clip llama spatial_unpad": (
        CLIPVisionConfig(**_VISION),
        LlamaConfig(**_TEXT),
        {"patch_merge_type": "spatial_unpad", **_TILES},
        {"patch_merge_type": "spatial_unpad", **_ANYRES},
    ),
    "clip mistral spatial": (
        CLIPVisionConfig(**_VISION),
        MistralConfig(**_TEXT, **_GROUPED),
        {"patch_merge_type": "spatial", **_TILES},
        {"patch_merge_type": "spatial", **_ANYRES},
    ),
    "siglip qwen2 flat": (
        SiglipVisionConfig(**_VISION),
        Qwen2Config(**_TEXT, num_key_value_heads=2, tie_word_embeddings=True),
        {"patch_merge_type": "flat", **_TILES},
        _ANYRES,
    ),
    "clip llama two layers, class token, linear": (
        CLIPVisionConfig(**_VISION),
        LlamaConfig(**_TEXT),
        {
            "vision_feature_layer": [-2, -1],
            "vision_feature_select_strategy": "cls_patch",
            "projector_type": "linear",
        },
        {"num_prefix_tokens": 1},
    ),
    "dinov2 with registers phi mlp3x": (
        Dinov2WithRegistersConfig(**_VISION, mlp_ratio=2, num_register_tokens=3),
        PhiConfig(**_TEXT),
        {"lm_head_bias": True, "projector_type": "mlp3x_gelu"},
        {},
    ),
    "siglip gemma scaled features": (
        SiglipVisionConfig(**_VISION),
        # Untied: of random tied weights, Gemma's answer would be one token for ever.
        GemmaConfig(**_TEXT, **_GROUPED, tie_word_embeddings=False),
        {"scale_image_features": True},
        {},
    ),
    "dinov2 qwen3": (
        Dinov2Config(**_VISION, mlp_ratio=2),
        Qwen3Config(**_TEXT, **_GROUPED, tie_word_embeddings=True),
        {},
        {},
    ),
    "clip llama nine visual tokens": (
        CLIPVisionConfig(**_VISION),
        LlamaConfig(**_TEXT),
        {"patch_merge_type": "spatial_unpad", "visual_tokens": 9, **_TILES},
        {"patch_merge_type": "spatial_unpad", "visual_tokens": 9, **_ANYRES},
    ),
}
"""Configurations of tower and language model, then fields of AnyLlavaConfig and of the processor."""


def save_layout(name: str, folder: Path) -> None:
    """Random weights, wide enough that other features give other tokens."""
    vision, text, fields, settings = LAYOUTS[name]
    processor = tiny_processor(**settings)
    torch.manual_seed(0)
    config = AnyLlavaConfig(vision, text, image_token_id=processor.image_token_id, **fields)
    model = AnyLlavaForConditionalGeneration(config)
    widen(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
