"""AnyLlavaModel and AnyLlavaForConditionalGeneration: a LLaVA in one reading.

The forward pass:
1. the pruned vision tower encodes tiles, and the projector maps their features to text embeddings;
2. the features of an image's tiles are merged to one sequence (`merge_tiles`, planned by `anyres_layout`), of which
   some are kept where the config asks for fewer (`visual_tokens`);
3. each position of `input_ids` that holds `image_token_id` is given one feature, in reading order;
4. the language model runs on the embeddings.

What is surprising: `image_token_id` may lie outside the vocabulary, so image positions are masked before the
embedding lookup; and `generate` runs steps 1 and 2 once, then passes the result on as `mm_encoder_outputs`.
"""

# Shape suffixes: B rows, L tokens, I images, T tiles, P features per tile, V vision width, D text width,
#                 N features of one image or of all, K of them that are kept

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.auto import AutoModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from processing_llava.anyres_layout import ImageLayout, plan_image
from processing_llava.config_fields import naming_config
from processing_llava.transformers_versions import CAN_CAPTURE_LAYERS, KV_CACHE

from .checkpoints.checkpoint_mixin import CheckpointMixin
from .configuration_llava import AnyLlavaConfig
from .generation import AnyLlavaGenerationMixin
from .image_encoder import build_projector, build_vision_tower
from .visual_tokens import check_image_tokens, choose_features, splice_features


@dataclass
class AnyLlavaModelOutputWithPast(BaseModelOutputWithPast):
    """Output of the language model, and the image features that it was given."""

    image_hidden_states: torch.FloatTensor | None = None
    """`[N, D]`: the features of all images in reading order."""


@dataclass
class AnyLlavaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """As `AnyLlavaModelOutputWithPast`, with logits and loss."""

    image_hidden_states: torch.FloatTensor | None = None


class AnyLlavaPreTrainedModel(CheckpointMixin, PreTrainedModel):
    config_class = AnyLlavaConfig
    config: AnyLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [KV_CACHE]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AnyLlavaModel) and module.image_newline is not None:
            nn.init.normal_(module.image_newline, std=1 / math.sqrt(self.config.text_config.hidden_size))


class AnyLlavaModel(AnyLlavaPreTrainedModel):
    """Vision tower, projector and language model, without the output layer."""

    def __init__(self, config: AnyLlavaConfig) -> None:
        super().__init__(config)
        config.check()
        text_size = config.text_config.hidden_size
        self.vision_tower = build_vision_tower(config.vision_config, num_layers=max(config.vision_feature_layers))
        self.mm_projector = build_projector(
            config.projector_type, in_size=config.vision_feature_size, out_size=text_size
        )
        has_newline = config.patch_merge_type == "spatial_unpad"
        self.image_newline = nn.Parameter(torch.zeros(text_size)) if has_newline else None
        with naming_config("text_config"):
            self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def plan_images(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None) -> list[ImageLayout]:
        """The layout of each image: its tiles, and how many features it has in the text.

        Args:
            pixel_values: `[I, 3, H, W]`, or `[I, T, 3, H, W]` for tiled images.
            image_sizes: `[I, 2]` original (height, width) in pixels; needed for tiled images.

        Raises:
            ValueError: if sizes are missing or do not match the images, or the tower takes images of another size.
        """
        config = self.config
        side = config.vision_config.image_size
        if tuple(pixel_values.shape[-2:]) != (side, side):
            raise ValueError(
                f"got pixel_values of {pixel_values.shape[-2]} by {pixel_values.shape[-1]} pixels; expected {side} by "
                f"{side}: leave the image processor's size as it is"
            )
        tile = {
            "tile_size": side,
            "patches_per_side": config.patches_per_side,
            "prefix_tokens": config.num_prefix_tokens,
            "patch_merge_type": config.patch_merge_type,
            "visual_tokens": config.visual_tokens,
        }
        if pixel_values.ndim == 4:
            return [plan_image(1, 1, pinpoints=None, **tile)] * len(pixel_values)
        if config.image_grid_pinpoints is None:
            raise ValueError(
                f"got tiled pixel_values of shape {tuple(pixel_values.shape)} but config.image_grid_pinpoints is "
                "None; expected [I, 3, H, W]: set the processor's image_aspect_ratio to 'pad' or 'square'"
            )
        if image_sizes is None or len(image_sizes) != len(pixel_values):
            raise ValueError(
                f"got {len(pixel_values)} tiled images and "
                f"{'no' if image_sizes is None else len(image_sizes)} image_sizes; expected one (height, width) for "
                "each image: pass on what the processor returns"
            )
        pinpoints = tuple(tuple(pinpoint) for pinpoint in config.image_grid_pinpoints)
        sizes = image_sizes.tolist() if isinstance(image_sizes, torch.Tensor) else image_sizes
        return [plan_image(height, width, pinpoints=pinpoints, **tile) for height, width in sizes]

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode and project images.

        Args:
            pixel_values: `[I, 3, H, W]`, or `[I, T, 3, H, W]` padded to the largest number of tiles.
            image_sizes: `[I, 2]` original (height, width) in pixels; needed for tiled images.

        Returns:
            The output of the vision tower over all tiles; `pooler_output` is a list with one `[N, D]` tensor for
            each image: its features in the order of the text, at most `visual_tokens` of them.

        Raises:
            ValueError: if `image_sizes` are missing or do not match the images.
        """
        outputs = self.encode_images(pixel_values, image_sizes, **kwargs)
        outputs.pooler_output = self.keep_features(outputs.pooler_output)
        return outputs

    def encode_images(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """As `get_image_features`, with all features of each image whatever `visual_tokens` says."""
        layouts = self.plan_images(pixel_values, image_sizes)
        if pixel_values.ndim == 5:
            pixel_values = torch.cat([tiles[: layout.num_tiles] for tiles, layout in zip(pixel_values, layouts)])
        outputs = self.encode_tiles(pixel_values, **kwargs)
        features_TPD = outputs.pooler_output
        images = features_TPD.split([layout.num_tiles for layout in layouts])
        outputs.pooler_output = [self.merge_tiles(tiles, layout) for tiles, layout in zip(images, layouts)]
        return outputs

    def keep_features(self, images: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Those features of each image, of all `[N, D]`, that the language model sees, in the same order."""
        if self.config.visual_tokens is None:
            return images
        kept = choose_features(images, self.config.visual_tokens)
        return [features_ND[kept_K] for features_ND, kept_K in zip(images, kept)]

    def encode_tiles(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """The tower's output over tiles `[T, 3, H, W]`, with the projected features `[T, P, D]` as pooler_output."""
        outputs = self.run_tower(pixel_values, **kwargs)
        outputs.pooler_output = self.project_features(self.select_features(outputs))
        return outputs

    def run_tower(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """The tower's output over tiles, with all hidden states that `select_features` takes.

        A frozen tower runs without gradients, which gradient checkpointing would compute.
        """
        if len(self.config.vision_feature_layers) > 1:
            layers = self.config.vision_feature_layers if CAN_CAPTURE_LAYERS else True
            kwargs["output_hidden_states"] = kwargs.get("output_hidden_states") or layers
        trains = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and (trains or pixel_values.requires_grad)):
            return self.vision_tower(pixel_values, return_dict=True, **kwargs)

    def select_features(self, outputs: BaseModelOutputWithPooling) -> torch.Tensor:
        """The part of the tower's output that the projector takes, `[T, P, V]`."""
        layers = self.config.vision_feature_layers
        if len(layers) > 1:
            features_TPV = torch.cat([outputs.hidden_states[layer] for layer in layers], dim=-1)
        else:
            features_TPV = outputs.last_hidden_state
        num_patches = self.config.patches_per_side**2
        return features_TPV[:, -(num_patches + self.config.num_prefix_tokens) :]

    def project_features(self, features_TPV: torch.Tensor) -> torch.Tensor:
        """Projected features, as the language model takes them, `[T, P, D]`."""
        features_TPD = self.mm_projector(features_TPV)
        if self.config.scale_image_features:
            features_TPD = features_TPD * math.sqrt(features_TPD.shape[-1])
        return features_TPD

    def complete_features(self, encoded: BaseModelOutputWithPooling) -> BaseModelOutputWithPooling:
        """Encoded images with `pooler_output`, which is projected from `last_hidden_state` where it is missing."""
        if encoded.pooler_output is not None:
            return encoded
        images = self.keep_features(self.project_features(encoded.last_hidden_state))
        return BaseModelOutputWithPooling(pooler_output=images)

    def merge_tiles(self, features_TPD: torch.Tensor, layout: ImageLayout) -> torch.Tensor:
        """One image's features `[N, D]`: the overview tile, then the detail tiles as the layout says."""
        if layout.num_tiles == 1 or self.config.patch_merge_type == "flat":
            return features_TPD.flatten(0, 1)
        overview_PD, details_TPD = features_TPD[0], features_TPD[1:]
        side = self.config.patches_per_side
        # [rows, columns, side, side, D] -> [rows * side, columns * side, D]
        grid = details_TPD.unflatten(1, (side, side)).unflatten(0, (layout.grid_rows, layout.grid_columns))
        grid = grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        grid = grid[layout.top : layout.bottom, layout.left : layout.right]
        if self.image_newline is not None:
            newline = self.image_newline.to(grid.dtype).expand(grid.shape[0], 1, -1)
            if self.config.scale_image_features:
                newline = newline * math.sqrt(newline.shape[-1])
            grid = torch.cat([grid, newline], dim=1)
        return torch.cat([overview_PD, grid.flatten(0, 1)])

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AnyLlavaModelOutputWithPast:
        """Hidden states of the language model, one for each position of `input_ids`.

        Args:
            input_ids: `[B, L]`; every image has as many `image_token_id` in its row as it has features.
            pixel_values: `[I, 3, H, W]` or `[I, T, 3, H, W]`: all images of all rows, in reading order.
            inputs_embeds: `[B, L, D]` instead of `input_ids`; with images only if `image_token_id` has an embedding.
            image_sizes: `[I, 2]` original (height, width); needed for tiled images.
            mm_encoder_outputs: `{"image": get_image_features(...)}` instead of `pixel_values`. Without pooler_output
                its last_hidden_state `[I, P, V]` is what `select_features` gives of one tile for each image, and is
                projected here: so features of a frozen tower can be stored while the projector trains.
            cache: The KV cache, whose name in transformers is `past_key_values` before 5.24; either name will do.

        Raises:
            ValueError: if image tokens and features disagree in a row, or inputs contradict each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("got both or neither of input_ids and inputs_embeds; expected exactly one of them")
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and encoded is not None:
            raise ValueError("got pixel_values and mm_encoder_outputs['image']; expected at most one of them")

        has_images = pixel_values is not None or encoded is not None
        image_mask_BL = self.get_image_mask(input_ids, inputs_embeds if has_images else None)
        if encoded is not None:
            encoded = self.complete_features(encoded)
        # Tokens are counted before the tower runs, which takes longest.
        if pixel_values is not None:
            features_per_image = [layout.num_tokens for layout in self.plan_images(pixel_values, image_sizes)]
        else:
            features_per_image = [] if encoded is None else [len(features_ND) for features_ND in encoded.pooler_output]
        if image_mask_BL is not None:
            check_image_tokens(image_mask_BL, features_per_image, visual_tokens=self.config.visual_tokens)
        if pixel_values is not None:
            encoded = self.get_image_features(pixel_values, image_sizes, return_dict=True)

        is_ours_to_change = inputs_embeds is None and not torch.is_grad_enabled()
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(image_mask_BL, 0))
        features_ND = None
        if encoded is not None:
            features_ND = torch.cat(list(encoded.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            if features_ND.shape[-1] != inputs_embeds.shape[-1]:
                raise ValueError(
                    f"got image features of width {features_ND.shape[-1]}; expected {inputs_embeds.shape[-1]}, the "
                    "width of this language model: encode the images with this model"
                )
            inputs_embeds = splice_features(inputs_embeds, image_mask_BL, features_ND, in_place=is_ours_to_change)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_dict=True,
            **{KV_CACHE: past_key_values if cache is None else cache},
            **kwargs,
        )
        return AnyLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{KV_CACHE: outputs.get(KV_CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features_ND,
        )

    def get_image_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.BoolTensor | None:
        """Mask of the image tokens, `[B, L]`; None for embeddings without images, which cannot be asked.

        Raises:
            ValueError: if only embeddings are given and the image token has none.
        """
        image_token_id = self.config.image_token_id
        if input_ids is not None:
            return input_ids == image_token_id
        if inputs_embeds is None:
            return None
        embeddings = self.get_input_embeddings()
        if not 0 <= image_token_id < embeddings.num_embeddings:
            raise ValueError(
                f"got inputs_embeds with images, but image_token_id={image_token_id} has no embedding among "
                f"{embeddings.num_embeddings}; expected input_ids: pass them instead of inputs_embeds"
            )
        image_embed = embeddings(torch.tensor(image_token_id, device=inputs_embeds.device))
        return (inputs_embeds == image_embed).all(-1)


class AnyLlavaForConditionalGeneration(AnyLlavaPreTrainedModel, AnyLlavaGenerationMixin):
    """A LLaVA that writes text about images."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: AnyLlavaConfig) -> None:
        super().__init__(config)
        self.model = AnyLlavaModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=config.lm_head_bias)
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    @property
    def vision_tower(self) -> nn.Module:
        """The tower, where scripts for the original LLaVA look for it."""
        return self.model.vision_tower

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """See `AnyLlavaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_sizes, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AnyLlavaCausalLMOutputWithPast:
        """Logits `[B, L, vocabulary]`, and the mean loss over `labels` where given.

        Args:
            labels: `[B, L]`; -100 and image tokens are not supervised.
            logits_to_keep: Number of last positions, or indices of positions, to compute logits for; 0 for all.
            The others: see `AnyLlavaModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            # An answer holds no image, and the image token may lie outside the vocabulary.
            labels = labels.masked_fill(labels == self.config.image_token_id, -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return AnyLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{KV_CACHE: outputs.get(KV_CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )
