"""What generation with images needs beyond transformers' GenerationMixin.

Image tokens may lie outside the vocabulary. Whatever indexes scores or embeddings by input ids (a repetition penalty,
a text model that drafts) is therefore shown text ids only. A LLaVA that drafts looks at the images itself:
transformers would hand it the features of the larger model, which are of another width or another meaning.

The KV cache lies in preallocated buffers, to which tokens are added in place. transformers copies the whole cache for
every token (transformers 5.23, cache_utils.py, DynamicLayer.update).
"""

from contextvars import ContextVar
from typing import Any

import torch
from transformers import (
    Cache,
    DynamicCache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    ProcessorMixin,
    StaticCache,
    SuppressTokensLogitsProcessor,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    AssistedCandidateGeneratorDifferentTokenizers,
    CandidateGenerator,
    PromptLookupCandidateGenerator,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from processing_llava.transformers_versions import (
    CAN_PREFILL_IMAGES_IN_CHUNKS,
    KV_CACHE,
    OTHER_KV_CACHE,
    is_checkpointing,
)

from .visual_tokens import check_image_tokens

logger = logging.get_logger(__name__)


_IMAGES: ContextVar[dict[str, torch.Tensor]] = ContextVar("_IMAGES")
"""Images of the innermost running `generate`, which has encoded and dropped them when it prepares its assistant."""


class AnyLlavaGenerationMixin(GenerationMixin):
    def generate(self, inputs: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """As in transformers; rows whose image tokens do not match their images are refused before any work.

        With a KV cache (`past_key_values`, or `cache` from transformers 5.24 on) the images are those behind the
        cached tokens.

        Raises:
            ValueError: if image tokens and images disagree, with the counts of the first such row.
        """
        if OTHER_KV_CACHE in kwargs:
            kwargs[KV_CACHE] = kwargs.pop(OTHER_KV_CACHE)
        if kwargs.get("mm_encoder_outputs") is None:
            kwargs.pop("mm_encoder_outputs", None)
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if isinstance(kwargs.get("tokenizer"), ProcessorMixin):
            # Stop strings need a tokenizer; `transformers serve` passes a processor (transformers 5.23,
            # cli/serving/utils.py).
            kwargs["tokenizer"] = kwargs["tokenizer"].tokenizer
        if input_ids is not None:
            self._warn_of_length(input_ids.shape[1])
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None:
            kwargs = {name: value for name, value in kwargs.items() if name not in ("pixel_values", "image_sizes")}
        elif input_ids is not None:
            layouts = self.model.plan_images(pixel_values, kwargs.get("image_sizes"))
            cache = kwargs.get(KV_CACHE)
            num_cached = 0 if cache is None else cache.get_seq_length()
            image_mask_BL = self.model.get_image_mask(input_ids[:, num_cached:], None)
            counts = [layout.num_tokens for layout in layouts]
            check_image_tokens(image_mask_BL, counts, visual_tokens=self.config.visual_tokens)
        if self.training and is_checkpointing(self):
            # Layers that are computed again in the backward pass write no KV cache.
            kwargs["use_cache"] = False
        images = {name: kwargs[name] for name in ("pixel_values", "image_sizes") if kwargs.get(name) is not None}
        settings = kwargs.get("generation_config") or self.generation_config
        early_exit = kwargs.get("assistant_early_exit", settings.assistant_early_exit)
        if early_exit is not None:
            raise ValueError(
                f"got assistant_early_exit={early_exit!r}, for which transformers cuts the layers of a language model "
                "alone; expected None: leave it out, or draft with assistant_model or prompt_lookup_num_tokens"
            )
        chunk_size = kwargs.get("prefill_chunk_size", settings.prefill_chunk_size)
        if images and chunk_size is not None and not CAN_PREFILL_IMAGES_IN_CHUNKS:
            raise ValueError(
                f"got images and prefill_chunk_size={chunk_size} with a transformers below 5.23, which gives all "
                "images to the first chunk; expected a newer one: leave prefill_chunk_size out, or update transformers"
            )
        outer_images = _IMAGES.set(images)
        try:
            return super().generate(inputs, **kwargs)
        finally:
            _IMAGES.reset(outer_images)

    def _warn_of_length(self, num_tokens: int) -> None:
        longest = read_max_length(self.config)
        if longest is not None and num_tokens > longest:
            logger.warning_once(
                f"got a prompt of more than {longest} tokens, for which this model was made; expected a shorter one: "
                "answers to it may make no sense"
            )

    # `generate` takes embeddings only where this signature names `inputs_embeds` (transformers 5.23,
    # generation/utils.py, _prepare_model_inputs).
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict[str, Any]:
        # No prefill of an assistant counts as a first iteration, and images are dropped from all others (transformers
        # 5.23, generation/utils.py, _sample). No assistant has a static cache, whose length would have to be fetched
        # from the GPU at every token.
        cache: Cache | None = kwargs.get(KV_CACHE)
        is_static = isinstance(cache, StaticCache)
        is_first_iteration = is_first_iteration or cache is None or (not is_static and cache.get_seq_length() == 0)
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs.pop("mm_encoder_outputs", None)
        return super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        *,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Encode the images if that was not done, and give each copy of a row all images of that row."""
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            encoded = self.get_image_features(pixel_values, image_sizes, return_dict=True)
        if encoded is not None and expand_size > 1:
            images = self.model.complete_features(encoded).pooler_output
            embeds = kwargs.get("inputs_embeds")
            image_mask_BL = self.model.get_image_mask(input_ids if embeds is None else None, embeds)
            counts = [len(features_ND) for features_ND in images]
            images_per_row = check_image_tokens(image_mask_BL, counts, visual_tokens=self.config.visual_tokens)
            rows = torch.arange(len(images)).split(images_per_row)
            copies = [images[image] for row in rows for image in row.tolist() * expand_size]
            encoded = BaseModelOutputWithPooling(pooler_output=copies)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs if encoded is None else kwargs | {"mm_encoder_outputs": {"image": encoded}}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict[str, Any], *args, **kwargs) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(KV_CACHE)
        if type(cache) is DynamicCache and not cache.offloading:
            preallocate(cache)

    def _get_logits_processor(
        self, *args, encoder_input_ids: torch.LongTensor | None = None, **kwargs
    ) -> LogitsProcessorList:
        vocab_size = self.config.text_config.vocab_size
        image_token_id = self.config.image_token_id
        if encoder_input_ids is not None and encoder_input_ids.ndim == 2:
            encoder_input_ids = replace_image_tokens(encoder_input_ids, vocab_size=vocab_size)
        processors = super()._get_logits_processor(*args, encoder_input_ids=encoder_input_ids, **kwargs)
        if 0 <= image_token_id < vocab_size:
            # It comes first, since a sampler among the processors leaves one token over.
            return LogitsProcessorList([ForbidImageToken(image_token_id), *processors])
        return TextOnlyLogitsProcessorList(processors, vocab_size=vocab_size) if processors else processors

    def _get_candidate_generator(self, *args, **kwargs) -> CandidateGenerator:
        generator = super()._get_candidate_generator(*args, **kwargs)
        if type(generator) is PromptLookupCandidateGenerator:
            return TextLookupGenerator(generator, image_token_id=self.config.image_token_id)
        if isinstance(generator, AssistedCandidateGenerator) and generator.assistant_model is not self:
            assistant = generator.assistant_model
            if "image" in assistant.input_modalities:
                self._show_images(generator)
            elif type(generator) is AssistedCandidateGenerator:
                generator.assistant_kwargs.pop("mm_encoder_outputs", None)
                return TextDraftGenerator(generator)
        return generator

    def _show_images(self, generator: AssistedCandidateGenerator) -> None:
        """Let an assistant that is a LLaVA encode the images itself.

        Raises:
            ValueError: if its images have other numbers of tokens than those of this model.
        """
        images = _IMAGES.get()
        if not images:
            return
        assistant = generator.assistant_model
        counts = [layout.num_tokens for layout in self.model.plan_images(**images)]
        expected = (
            f"expected one with the tokenizer of this model and images of {counts} tokens: take another or a language "
            "model, which drafts from the text alone"
        )
        if isinstance(generator, AssistedCandidateGeneratorDifferentTokenizers):
            raise ValueError(f"got an assistant that sees images and has another tokenizer; {expected}")
        try:
            encoded = assistant.get_image_features(
                **{name: value.to(assistant.device) for name, value in images.items()}, return_dict=True
            )
        except ValueError as error:
            raise ValueError(f"got an assistant that cannot read the images ({error}); {expected}") from error
        assistant_counts = [len(features) for features in encoded.pooler_output]
        if assistant_counts != counts:
            raise ValueError(f"got an assistant with images of {assistant_counts} tokens; {expected}")
        generator.assistant_kwargs["mm_encoder_outputs"] = {"image": encoded}


class ForbidImageToken(LogitsProcessor):
    """Gives the image token no chance, where it has a logit at all, as in transformers' own checkpoints."""

    def __init__(self, image_token_id: int) -> None:
        self.image_token_id = image_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return forbid_image_token(scores, self.image_token_id)


def forbid_image_token(scores_BV: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """Scores of an answer, which can hold no image."""
    if not 0 <= image_token_id < scores_BV.shape[1]:
        return scores_BV
    scores_BV = scores_BV.clone()
    scores_BV[:, image_token_id] = -torch.inf
    return scores_BV


class TextOnlyLogitsProcessorList(LogitsProcessorList):
    """Logits processors that are not shown image tokens."""

    def __init__(self, processors: LogitsProcessorList, *, vocab_size: int) -> None:
        super().__init__(processors)
        self.vocab_size = vocab_size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.FloatTensor:
        return super().__call__(replace_image_tokens(input_ids, vocab_size=self.vocab_size), scores, **kwargs)


class TextDraftGenerator(CandidateGenerator):
    """Candidates of a language model that cannot see: it is shown the text around the images."""

    def __init__(self, generator: AssistedCandidateGenerator) -> None:
        self.generator = generator
        self.vocab_size = generator.assistant_model.config.get_text_config().vocab_size

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs) -> tuple[torch.LongTensor, torch.Tensor | None]:
        text_ids = replace_image_tokens(input_ids, vocab_size=self.vocab_size)
        candidates, logits = self.generator.get_candidates(text_ids, **kwargs)
        new_tokens = candidates[:, input_ids.shape[1] :].to(input_ids.device)
        return torch.cat([input_ids, new_tokens], dim=1), logits

    def update_candidate_strategy(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, num_matches: int
    ) -> None:
        self.generator.update_candidate_strategy(input_ids, scores, num_matches)


class TextLookupGenerator(CandidateGenerator):
    """Candidates of prompt lookup, which continue as the text of the prompt does, and never with an image."""

    def __init__(self, generator: PromptLookupCandidateGenerator, *, image_token_id: int) -> None:
        self.generator = generator
        self.image_token_id = image_token_id
        # Image tokens are replaced by a suppressed token, at which the generator ends a candidate or looks for another
        # match (transformers 5.23, generation/candidate_generator.py, PromptLookupCandidateGenerator).
        self.placeholder = 0 if generator.eos_token_id is None else int(generator.eos_token_id[0])
        generator.logits_processor = LogitsProcessorList(
            [*(generator.logits_processor or ()), SuppressTokensLogitsProcessor([self.placeholder])]
        )

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs) -> tuple[torch.LongTensor, None]:
        text_ids = input_ids.masked_fill(input_ids == self.image_token_id, self.placeholder)
        candidates, _ = self.generator.get_candidates(text_ids, **kwargs)
        return torch.cat([input_ids, candidates[:, input_ids.shape[1] :]], dim=1), None

    def update_candidate_strategy(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, num_matches: int
    ) -> None:
        """Does nothing: what is found does not depend on what was accepted."""


def read_max_length(config: PreTrainedConfig) -> int | None:
    """The number of tokens that a language model was made for; None if its configuration does not say."""
    text_config = config.get_text_config(decoder=True).to_dict()
    # MPT's name is the second one.
    return text_config.get("max_position_embeddings", text_config.get("max_seq_len"))


def replace_image_tokens(input_ids: torch.LongTensor, *, vocab_size: int) -> torch.LongTensor:
    """Ids `[B, L]` in which those without an embedding are the largest other id of their row.

    An id that the row holds anyway adds nothing to what a repetition penalty punishes.
    """
    if input_ids.shape[1] == 0:  # where embeddings were given
        return input_ids
    has_embedding = (input_ids >= 0) & (input_ids < vocab_size)
    largest_ids = input_ids.where(has_embedding, 0).amax(dim=1, keepdim=True)
    return input_ids.where(has_embedding, largest_ids)


def preallocate(cache: DynamicCache) -> None:
    """Let layers of a KV cache that are still empty grow without copies; sliding windows stay as they are."""
    cache.layers = [
        PreallocatedLayer() if type(layer) is DynamicLayer and not layer.is_initialized else layer
        for layer in cache.layers
    ]
    # A cache that was made without a config makes a layer at its first update.
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = PreallocatedLayer


def count_spare_tokens(num_rows: int) -> int:
    """Room for further tokens behind those of each row: more of it saves copies and takes memory."""
    return max(16, 128 // num_rows)


class PreallocatedLayer(DynamicLayer):
    """KV cache of one layer at the beginning of a buffer, whose rest takes the next tokens.

    Keys and values that were returned before are overwritten where the cache was cropped and has grown again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # A backward pass needs keys and values as they were, and a compiled graph knows no addresses.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, cached: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Keys or values `[B, heads, L, width]` with new ones behind them."""
        start = cached.shape[-2] if cached.numel() else 0
        stop = start + new.shape[-2]
        buffer = self._buffers.get(name)
        # Beams and selected rows are other tensors than the one that was returned here.
        is_here = buffer is not None and (cached.data_ptr(), len(cached)) == (buffer.data_ptr(), len(buffer))
        is_locked = is_here and buffer.is_inference() and not torch.is_inference_mode_enabled()
        if not is_here or is_locked or stop > buffer.shape[-2]:
            rows, heads, _, width = new.shape
            buffer = new.new_empty(rows, heads, stop + count_spare_tokens(rows), width)
            if start:
                buffer[:, :, :start] = cached
            self._buffers[name] = buffer
        buffer[:, :, start:stop] = new
        return buffer[:, :, :stop]
