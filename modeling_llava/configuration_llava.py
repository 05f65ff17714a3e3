"""AnyLlavaConfig: every dense LLaVA is one class whose parts are chosen here.

What is surprising: `vision_feature_layer` counts like the `hidden_states` of a transformers vision model (0 is the
embedding output, -1 the last layer), `image_grid_pinpoints` are (height, width) pairs whose order decides ties, and
`image_token_id` may lie outside the vocabulary: image positions never reach the embedding table.
"""

import os
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from processing_llava.anyres_layout import check_merge_type, check_pinpoints, check_visual_tokens
from processing_llava.config_fields import (
    build_config,
    check_dtype,
    check_part,
    check_sub_configs,
    naming_config,
    use_one_side,
)
from processing_llava.messages import shorten

from .image_encoder import check_projector_type, vision_tower_family

logger = logging.get_logger(__name__)

FEATURE_SELECT_STRATEGIES = ("patch", "cls_patch")
PARTS = {"vision_config": "clip_vision_model", "text_config": "llama"}
"""Fields that hold a configuration, and the model_type of one that does not say it."""


KERNEL_FIELDS = ("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation")
LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)
"""Fields of language models that change the logits after the output layer (transformers 5.23, models/)."""


class AnyLlavaConfig(PreTrainedConfig):
    """Configuration of a LLaVA: a vision tower, a projector and a causal language model.

    Args:
        vision_config: Configuration (or its dict) of the vision tower: CLIP, SigLIP or DINOv2.
        text_config: Configuration (or its dict) of any causal language model of transformers.
        image_token_id: Id that stands for one image feature in `input_ids`.
        projector_type: "linear", "mlpNx_gelu" for any N from 1 to 99, or "identity".
        vision_feature_layer: Index, or list of indices, of the hidden states that are projected. Features of several
            layers are concatenated along the channels.
        vision_feature_select_strategy: "patch" drops the prefix tokens of the tower (class token, registers);
            "cls_patch" keeps them.
        patch_merge_type: How the features of several tiles become one sequence: "flat" (tile after tile), "spatial"
            (one grid in reading order) or "spatial_unpad" (the same without the padding, one learned newline per row).
        image_grid_pinpoints: Sizes in pixels as (height, width) that an image may be tiled to; None for one tile.
        visual_tokens: Most tokens of an image, over all its tiles, that the language model sees; None for all. An
            image with fewer keeps them. DivPrune (arXiv:2503.02175, see `visual_tokens.py`) chooses them without
            training and without the question, at the cost of one product of all pairs of the image's features; prompt
            and KV cache are shorter by the tokens left out. Answers are worse: LLaVA-1.5-7B is reported to keep 98.0,
            96.9 and 94.8 % of its mean score with 192, 128 and 64 of 576 tokens (arXiv:2508.18264, table 1).
            Grounding, which asks where things are (RefCOCO), suffers most (arXiv:2602.02951), then reading; and
            counting, since things that look alike are left out first. The processor needs the same number.
        scale_image_features: Multiply projected features by sqrt(hidden_size). LLaVAs on Gemma that were trained
            before transformers 5, where the language model scaled every input embedding, need it.
        lm_head_bias: Whether the output layer has a bias (Phi has one).
        tie_word_embeddings: Whether the output layer shares the input embeddings. Default: what `text_config` says.

    Raises:
        ValueError: if a choice is unknown, or a part cannot be combined with another.
    """

    model_type = "any_llava"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict | None = None,
        text_config: PreTrainedConfig | dict | None = None,
        *,
        image_token_id: int = 32000,
        projector_type: str = "mlp2x_gelu",
        vision_feature_layer: int | list[int] = -2,
        vision_feature_select_strategy: str = "patch",
        patch_merge_type: str = "flat",
        image_grid_pinpoints: list[list[int]] | None = None,
        visual_tokens: int | None = None,
        scale_image_features: bool = False,
        lm_head_bias: bool = False,
        tie_word_embeddings: bool | None = None,
        **kwargs,
    ) -> None:
        _refuse_original(kwargs)
        self.vision_config = _sub_config("vision_config", vision_config)
        use_one_side(self.vision_config)
        self.text_config = _sub_config("text_config", text_config)
        self.image_token_id = image_token_id
        self.projector_type = projector_type
        are_layers = isinstance(vision_feature_layer, (list, tuple))
        layers = list(vision_feature_layer) if are_layers else [vision_feature_layer]
        self.vision_feature_layer = layers[0] if len(layers) == 1 else layers
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.patch_merge_type = patch_merge_type
        self.image_grid_pinpoints = image_grid_pinpoints
        self.visual_tokens = visual_tokens
        self.scale_image_features = scale_image_features
        self.lm_head_bias = lm_head_bias
        if tie_word_embeddings is None:
            tie_word_embeddings = self.text_config.tie_word_embeddings
        self.check()
        if not isinstance(tie_word_embeddings, bool):
            raise ValueError(
                f"got tie_word_embeddings={shorten(tie_word_embeddings)}; expected true or false: correct it"
            )
        check_dtype(kwargs.get("dtype", kwargs.get("torch_dtype")))
        build_config("config", kwargs, lambda fields: PreTrainedConfig(**fields))
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "AnyLlavaConfig":
        _refuse_original(config_dict)
        check_sub_configs(config_dict, required=PARTS)
        config_dict = _drop_kernels(config_dict)
        for part in PARTS:
            config_dict[part] = _drop_kernels(config_dict[part])
            _sub_config(part, config_dict[part])
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        for part in (fields["vision_config"], fields["text_config"]):
            # A path of this machine is not written to a file.
            if os.path.isabs(str(part.get("_name_or_path") or "")):
                del part["_name_or_path"]
        return fields

    @property
    def vision_feature_layers(self) -> list[int]:
        """The hidden states that are projected, as non-negative indices."""
        num_hidden_states = self.vision_config.num_hidden_layers + 1
        return [layer % num_hidden_states for layer in self._list_layers()]

    def _list_layers(self) -> list[int]:
        layers = self.vision_feature_layer
        return layers if isinstance(layers, list) else [layers]

    @property
    def vision_feature_size(self) -> int:
        """Channels of one feature before projection."""
        return self.vision_config.hidden_size * len(self.vision_feature_layers)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of features of a tile that are kept and are not patches."""
        if self.vision_feature_select_strategy == "patch":
            return 0
        return vision_tower_family(self.vision_config).num_prefix_tokens(self.vision_config)

    @property
    def patches_per_side(self) -> int:
        return self.vision_config.image_size // self.vision_config.patch_size

    def check(self) -> None:
        """Refuse fields that make no model; the model calls it too, for fields that were set after `__init__`.

        Raises:
            ValueError: naming the field.
        """
        check_part("vision_config", self.vision_config)
        check_part("text_config", self.text_config)
        self._check_types()
        text_fields = self.text_config.to_dict()
        for name in LOGIT_TRANSFORMS:
            if text_fields.get(name) not in (None, 1.0):
                raise ValueError(
                    f"got a language model with {name}={text_fields[name]}; expected one whose logits are what its "
                    "output layer gives, as in Llama, Mistral, Qwen, Gemma, Gemma 3 and Phi: take another one"
                )
        num_layers = self.vision_config.num_hidden_layers
        layers = self._list_layers()
        if not layers or not all(type(layer) is int and -num_layers - 1 <= layer <= num_layers for layer in layers):
            raise ValueError(
                f"got vision_feature_layer={self.vision_feature_layer}; expected one or several indices from "
                f"{-num_layers - 1} to {num_layers}, since the tower has {num_layers} layers"
            )
        check_projector_type(
            self.projector_type, in_size=self.vision_feature_size, out_size=self.text_config.hidden_size
        )
        vision_tower_family(self.vision_config)
        if self.vision_feature_select_strategy not in FEATURE_SELECT_STRATEGIES:
            raise ValueError(
                f"got vision_feature_select_strategy={self.vision_feature_select_strategy!r}; "
                f"expected one of {', '.join(FEATURE_SELECT_STRATEGIES)}"
            )
        check_merge_type(self.patch_merge_type)
        check_visual_tokens(self.visual_tokens)
        if self.image_grid_pinpoints is not None:
            with naming_config(f"image_grid_pinpoints={shorten(self.image_grid_pinpoints)}"):
                check_pinpoints(self.image_grid_pinpoints, tile_size=self.vision_config.image_size)
        if self.image_grid_pinpoints and self.patch_merge_type != "flat" and self.num_prefix_tokens:
            raise ValueError(
                f"got vision_feature_select_strategy='cls_patch' with patch_merge_type={self.patch_merge_type!r}; "
                "a class token has no place in a grid: use 'patch', or patch_merge_type='flat'"
            )

    def _check_types(self) -> None:
        expected = {"image_token_id": int, "projector_type": str, "scale_image_features": bool, "lm_head_bias": bool}
        for name, kind in expected.items():
            value = getattr(self, name)
            if type(value) is not kind:
                raise ValueError(f"got {name}={shorten(value)}; expected {kind.__name__}: correct config.json")
        if self.patches_per_side < 1:
            raise ValueError(
                f"got vision_config.patch_size={self.vision_config.patch_size} with "
                f"vision_config.image_size={self.vision_config.image_size}; expected at least one patch: correct "
                "config.json"
            )


def _refuse_original(fields: dict[str, Any]) -> None:
    if "mm_vision_tower" in fields or "mm_projector_type" in fields:
        raise ValueError(
            "got the config.json of an original LLaVA as AnyLlavaConfig; expected AutoConfig.from_pretrained, which "
            "translates it"
        )


def _drop_kernels(fields: PreTrainedConfig | dict) -> PreTrainedConfig | dict:
    """Fields of a file without those that choose kernels, which may need packages: that is for the caller to say."""
    if isinstance(fields, PreTrainedConfig):
        return fields
    found = [name for name in KERNEL_FIELDS if fields.get(name) is not None]
    if found:
        logger.warning_once(
            f"config.json holds {found[0]}={shorten(fields[found[0]])}, which the caller chooses; no effect"
        )
    return {name: value for name, value in fields.items() if name not in KERNEL_FIELDS}


def _sub_config(part: str, config: PreTrainedConfig | dict | None) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    fields = {"model_type": PARTS[part]} | dict(config or {})
    return build_config(part, fields, lambda fields: AutoConfig.for_model(**fields))
