"""CachedGeneration: `generate` that computes only what a ChatCache does not know.

Key/value states are reused where they can be cut after any token: full attention, and sliding windows until a
conversation outgrows them. Quantized and recurrent caches are not reused, nor are states whose positions
depend on the length of the conversation. Features of images always are.

Telling images apart takes the number of tokens of each, so only `REUSING_MODEL_TYPES` reuse anything; other models
answer as `generate` does. (`AnyLlavaForConditionalGeneration.from_pretrained` reads transformers' LLaVA-NeXT, too.)
"""

from functools import partial

import torch
from transformers import BatchFeature, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_llava.acceleration.compiled_decoding import build_compile_config, build_static_states, decode_ahead
from modeling_llava.acceleration.int8_linear import Int8Linear
from modeling_llava.acceleration.packed_linear import PackedLinear
from modeling_llava.generation import read_max_length
from modeling_llava.roomy_states import leave_room
from processing_llava.transformers_versions import KV_CACHE, TAKES_ENCODED_IMAGES

from .chat_cache import ChatCache, TokenKey
from .prompt_images import PromptImage, load_features, read_images

REUSING_MODEL_TYPES = ("any_llava", "llava") if TAKES_ENCODED_IMAGES else ("any_llava",)
"""Ours, and transformers' own LLaVA 1.5."""
LENGTH_DEPENDENT_ROPE_TYPES = {"dynamic", "longrope"}
"""Position embeddings of the first tokens change when a conversation grows long."""


class CachedGeneration:
    """The answer to one prompt.

    Args:
        model: In evaluation mode.
        inputs: What the processor returns for one conversation.
        cache: Of this model.
        scope: What was kept under another scope is not found.
        compile: Decode with compiled code; the model must pass `check_compiles`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: BatchFeature,
        cache: ChatCache,
        *,
        scope: bytes = b"",
        compile: bool = False,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.cache = cache
        self.scope = scope
        self.compile = compile
        self.num_reused_tokens = 0

    @torch.no_grad()
    def run(self, *, max_new_tokens: int, **settings) -> None:
        """As `model.generate(**inputs, **settings)`; the lock of the cache must be held."""
        settings["max_new_tokens"] = max_new_tokens
        device = self.model.device
        if not self._can_reuse():
            self.model.generate(**self.inputs.to(device), **settings)
            return
        images = read_images(self.model, self.inputs, scope=self.scope)
        keys: list[TokenKey] = self.inputs["input_ids"][0].tolist()
        for image in images:
            keys[image.start : image.start + image.num_tokens] = [image.digest] * image.num_tokens
        # The root of the cache's tree: conversations with different first keys have nothing in common.
        keys[0] = self.scope + str(keys[0]).encode()
        past = self._recall_states(keys, max_new_tokens=max_new_tokens)
        if past is not None:
            settings[KV_CACHE] = past
        if self.compile:
            settings["compile_config"] = build_compile_config(device)
            # Transformers keeps the streamer from a loop that is not its own.
            settings["custom_generate"] = partial(decode_ahead, streamer=settings.get("streamer"))
        features = self._load_features(images)
        if features:
            settings["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        text = {name: self.inputs[name].to(device) for name in ("input_ids", "attention_mask")}
        output_ids = self.model.generate(**text, **settings)
        length = 0 if past is None else int(past.get_seq_length())
        # A sliding window that is full has dropped the states of the first tokens.
        if past is not None and all(layer.keys.shape[-2] >= length for layer in past.layers):
            keys += output_ids[0, len(keys) :].tolist()
            states = [states[..., :length, :] for layer in past.layers for states in (layer.keys, layer.values)]
            # The cache copies them, and nothing else may hold them meanwhile.
            del past, settings
            # The last token of an answer has never been an input.
            self.cache.store_states(keys[:length], states)

    def _recall_states(self, keys: list[TokenKey], *, max_new_tokens: int) -> Cache | None:
        """States that begin with what is known of a prompt; None where they cannot be reused.

        In a call of its own, so that nothing holds on to the copy that the cache gave while an answer is made.
        """
        if not self.compile:
            past = build_states(self.model)
        else:
            past = build_static_states(self.model, len(keys) + max_new_tokens, made=self.cache.static_states)
        if past is not None:
            # The last token is always computed: the answer begins with its logits.
            self.num_reused_tokens, states = self.cache.find_states(keys[:-1])
            for layer, (key_states, value_states) in enumerate(zip(states, states)):
                past.update(key_states, value_states, layer)
        return past

    def _can_reuse(self) -> bool:
        model_type = self.model.config.model_type
        # A LLaVA with a Pixtral tower has images of different sizes, and says so.
        return model_type in REUSING_MODEL_TYPES and not (model_type == "llava" and "image_sizes" in self.inputs)

    def _load_features(self, images: list[PromptImage]) -> list[torch.Tensor]:
        """Features of the image tokens that are not reused, in reading order."""
        images = [image for image in images if image.start + image.num_tokens > self.num_reused_tokens]
        features = load_features(self.model, self.cache, [(image, self.inputs) for image in images])
        starts = [max(0, self.num_reused_tokens - image.start) for image in images]
        return [image_features[start:] for image_features, start in zip(features, starts)]


def limit_new_tokens(config: PreTrainedConfig, *, num_prompt_tokens: int, max_new_tokens: int) -> int:
    """`max_new_tokens`, or what a prompt leaves of the length that a model was made for.

    Raises:
        ValueError: if it leaves nothing.
    """
    max_length = read_max_length(config)
    if max_length is None:
        return max_new_tokens
    if num_prompt_tokens >= max_length:
        raise ValueError(
            f"got a conversation of {num_prompt_tokens} tokens; expected fewer than {max_length}, for which this "
            "model was made: begin anew, or take pictures out"
        )
    return min(max_new_tokens, max_length - num_prompt_tokens)


def build_states(model: PreTrainedModel) -> DynamicCache | None:
    """Empty states for `generate`, or None where they cannot be reused."""
    config = model.config.get_text_config(decoder=True)
    rope = config.to_dict().get("rope_parameters") or {}
    rope_types = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if model.generation_config.cache_implementation is not None or rope_types & LENGTH_DEPENDENT_ROPE_TYPES:
        return None
    states = DynamicCache(config=config)
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in states.layers):
        return None
    leave_room(states)
    return states


def check_compiles(model: PreTrainedModel) -> None:
    """Refuse a model whose decoding cannot be compiled.

    Raises:
        ValueError: saying why.
    """
    states = build_states(model) if model.config.model_type == "any_llava" else None
    if states is None:
        raise ValueError(
            f"got compile=True for a {type(model).__name__}; expected one of ours whose states can be reused: leave "
            "compile out"
        )
    if any(type(layer) is DynamicSlidingWindowLayer for layer in states.layers):
        raise ValueError(
            "got compile=True for a language model with a sliding window, whose states count their tokens in numbers "
            "that a graph holds fixed; expected full attention: leave compile out"
        )
    language_model = model.base_model.language_model
    if not language_model._can_compile_fullgraph:
        raise ValueError(
            f"got compile=True for a {type(language_model).__name__}; expected a language model that runs on states "
            "of fixed size: leave compile out"
        )
    decoder = [*language_model.modules(), model.get_output_embeddings()]
    if any(isinstance(module, (Int8Linear, PackedLinear)) for module in decoder):
        raise ValueError(
            "got compile=True for a model that was loaded for answering on a processor; expected one on a GPU: leave "
            "compile out, packed and int8 weights are as fast without"
        )
