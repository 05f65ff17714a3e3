"""What encodes an image: a vision tower, and the projector from its features to text embeddings.

Towers differ in the tokens that precede the patches, and in the parameters that no LLaVA ever uses. A tower is pruned
when it is built: layers after the last used hidden state, the final norm, pooling heads and mask tokens never reach
the projector. They would cost time and memory, and get no gradient in training.

The parameters of projectors carry the names of the published checkpoints: `mm_projector.weight` for the linear one,
`mm_projector.0.weight`, `mm_projector.2.weight`, ... for the others (the odd indices are activations).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from processing_llava.config_fields import naming_config
from processing_llava.transformers_versions import HAS_OLD_DINOV2_NAMES


@dataclass(frozen=True, kw_only=True)
class VisionTowerFamily:
    """What differs between the vision models of transformers. Names are paths of submodules."""

    num_prefix_tokens: Callable[[PreTrainedConfig], int]
    """Number of tokens before the patches: class token and registers."""
    layers: str
    """Name of the ModuleList of transformer layers."""
    final_norm: str
    """Name of the norm after the last layer; the hidden states used here are taken before it."""
    prune: Callable[[PreTrainedModel], None] = lambda tower: None
    """Removes further parameters that no LLaVA uses."""


def _remove_pooling_head(tower: PreTrainedModel) -> None:
    if tower.use_head:
        tower.use_head = False
        del tower.head


def _remove_mask_token(tower: PreTrainedModel) -> None:
    # A buffer, not None: transformers initialises the token of a tower with registers in any case (transformers 5.23,
    # models/dinov2_with_registers/modeling_dinov2_with_registers.py, _init_weights).
    mask_token = tower.embeddings.mask_token.data
    del tower.embeddings.mask_token
    tower.embeddings.register_buffer("mask_token", mask_token, persistent=False)


VISION_TOWER_FAMILIES = {
    "clip_vision_model": VisionTowerFamily(
        num_prefix_tokens=lambda config: 1, layers="encoder.layers", final_norm="post_layernorm"
    ),
    "siglip_vision_model": VisionTowerFamily(
        num_prefix_tokens=lambda config: 0,
        layers="encoder.layers",
        final_norm="post_layernorm",
        prune=_remove_pooling_head,
    ),
    "dinov2": VisionTowerFamily(
        num_prefix_tokens=lambda config: 1, layers="encoder.layer", final_norm="layernorm", prune=_remove_mask_token
    ),
    "dinov2_with_registers": VisionTowerFamily(
        num_prefix_tokens=lambda config: 1 + config.num_register_tokens,
        layers="encoder.layer",
        final_norm="layernorm",
        prune=_remove_mask_token,
    ),
}

DINOV2_NAMES = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "output.dense",
}
"""Weights of an attention layer by their names in transformers from 5.18 on, and before. Newer versions read both."""
if HAS_OLD_DINOV2_NAMES:
    _layer = r"vision_tower\.encoder\.layer\.(\d+)\.attention\."
    register_checkpoint_conversion_mapping(
        "any_llava",
        [
            WeightRenaming(_layer + new, rf"vision_tower.encoder.layer.\1.attention.{old}")
            for new, old in DINOV2_NAMES.items()
        ],
        overwrite=True,
    )


def vision_tower_family(config: PreTrainedConfig) -> VisionTowerFamily:
    """The family of a vision configuration.

    Raises:
        ValueError: if no LLaVA can be built on this kind of tower yet.
    """
    if config.model_type not in VISION_TOWER_FAMILIES:
        raise ValueError(
            f"got a vision tower of type {config.model_type!r}; expected one of {', '.join(VISION_TOWER_FAMILIES)}"
        )
    return VISION_TOWER_FAMILIES[config.model_type]


def build_vision_tower(config: PreTrainedConfig, *, num_layers: int) -> PreTrainedModel:
    """An untrained tower that ends after `num_layers` layers, without final norm, head or mask token."""
    with naming_config("vision_config"):
        tower = AutoModel.from_config(config)
    prune_vision_tower(tower, num_layers=num_layers)
    return tower


def prune_vision_tower(tower: PreTrainedModel, *, num_layers: int) -> None:
    """Remove in place what comes after layer `num_layers`, so that `last_hidden_state` is that layer's output."""
    family = vision_tower_family(tower.config)
    del tower.get_submodule(family.layers)[num_layers:]
    tower.set_submodule(family.final_norm, nn.Identity())
    family.prune(tower)


# Projectors.

MLP_PATTERN = re.compile(r"mlp([1-9]\d?)x_gelu")


def check_projector_type(projector_type: str, *, in_size: int, out_size: int) -> None:
    """Refuse a projector that does not exist or does not fit.

    Raises:
        ValueError: for an unknown type, or "identity" between different sizes.
    """
    if projector_type == "identity":
        if in_size != out_size:
            raise ValueError(
                f"got projector_type='identity' with vision features of size {in_size} and a text model of size "
                f"{out_size}; expected equal sizes: use 'linear' or 'mlp2x_gelu'"
            )
    elif projector_type != "linear" and MLP_PATTERN.fullmatch(projector_type) is None:
        raise ValueError(
            f"got projector_type={projector_type!r}; expected 'linear', 'identity' or 'mlpNx_gelu' with N from 1 to 99"
        )


def build_projector(projector_type: str, *, in_size: int, out_size: int) -> nn.Module:
    """The projector `[..., in_size]` -> `[..., out_size]` of a type that `check_projector_type` accepts."""
    check_projector_type(projector_type, in_size=in_size, out_size=out_size)
    if projector_type == "identity":
        return nn.Identity()
    if projector_type == "linear":
        return nn.Linear(in_size, out_size)
    depth = int(MLP_PATTERN.fullmatch(projector_type).group(1))
    layers = [nn.Linear(in_size, out_size)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(out_size, out_size)]
    return nn.Sequential(*layers)
