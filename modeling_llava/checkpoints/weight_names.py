"""The names of the same weights in three layouts: ours, the original LLaVA's, and transformers' own."""

import re
from typing import Any

import torch

# fmt: off
_TO_OURS = {
    "original": (
        (r"^(?:model|transformer)\.vision_tower\.vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
        (r"^(?:model|transformer)\.(mm_projector|image_newline)\b", r"model.\1"),
        (r"^(?:model|transformer)\.(?!vision_tower\.|mm_projector\b|image_newline\b)", "model.language_model."),
    ),
    "transformers": (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
        (r"^(?:model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
        (r"^(?:model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
        (r"^image_newline$", "model.image_newline"),
    ),
}
_FROM_OURS = {
    "original": (
        (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
        (r"^model\.language_model\.", "model."),
    ),
    "transformers": (
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
        (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
        (r"^model\.image_newline$", "image_newline"),
    ),
}
# fmt: on
LAYOUTS = ("any_llava", *_TO_OURS)


def check_layout(layout: str) -> None:
    """Refuse a layout that does not exist.

    Raises:
        ValueError: naming those that do.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"got layout={layout!r}; expected one of {', '.join(LAYOUTS)}")


def rename_to_ours(key: str, layout: str) -> str:
    """Our name of a weight that another layout calls `key`."""
    return _rename(key, _TO_OURS[layout])


def rename_from_ours(key: str, layout: str) -> str:
    """What another layout calls a weight of ours."""
    return _rename(key, _FROM_OURS[layout])


def _rename(key: str, renamings: tuple[tuple[str, str], ...]) -> str:
    """The key as the first pattern that it matches says."""
    for pattern, replacement in renamings:
        renamed, found = re.subn(pattern, replacement, key)
        if found:
            return renamed
    return key


def add_transformers_only_weights(weights: dict[str, Any], *, vocab_size: int, vision_size: int) -> None:
    """Add in place, under our names, what transformers' own classes hold beyond ours.

    Their image token needs rows in the embedding and output matrices. The new rows are the mean of the others, so
    that greedy decoding never chooses a new token. Their towers end in a norm that no LLaVA applies.
    """
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if name in weights and len(weights[name]) < vocab_size:
            weights[name] = grow_rows(weights[name], vocab_size)
    like = weights["model.mm_projector.0.bias"]
    weights["model.vision_tower.post_layernorm.weight"] = torch.ones(vision_size, dtype=like.dtype)
    weights["model.vision_tower.post_layernorm.bias"] = torch.zeros(vision_size, dtype=like.dtype)


def grow_rows(matrix: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The matrix with more rows, each the mean of those there were."""
    mean = matrix.float().mean(dim=0, keepdim=True).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(num_rows - len(matrix), -1)])
