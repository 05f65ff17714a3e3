"""CachedGeneration: `generate` that computes only what a ChatCache does not know, and decoding with compiled code.

Keys and values are reused where they can be cut after any token: full attention, and sliding windows until a
conversation outgrows them. Quantized and recurrent caches are not reused, nor are those whose positions depend on the
length of the conversation. Features of images always are.

Compiled decoding has a KV cache of fixed size, so that one graph serves every token and every turn. Only the steps of
one token are compiled; a prompt has another length every time and takes few steps. On a GPU the steps become CUDA
graphs. A step reads every weight for one row, so that nothing counts but the rate at which memory is read. As in
PyTorch's gpt-fast, products with a single row are therefore no calls of a library: with `coordinate_descent_tuning`
the compiler writes and tunes kernels for them, three products of one input in one, with the norms around them. And
attention of one token is written as products (`cpu_attention`), which it fuses in the same way.
"""

from collections import deque
from functools import partial
from typing import NamedTuple

import torch
from transformers import (
    BatchFeature,
    Cache,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_llava.acceleration.cpu_linear import Int8Linear, PackedLinear
from modeling_llava.generation import preallocate, read_max_length
from processing_llava.transformers_versions import KV_CACHE

from .chat_cache import ChatCache, PromptImage, TokenKey, load_features, read_images

MIN_CACHE_LENGTH = 1024
"""Of the states, in tokens: an image of 576 and a few turns. Longer ones double it, and are compiled anew."""


def build_static_cache(model: PreTrainedModel, num_tokens: int, *, made: dict[int, StaticCache]) -> StaticCache:
    """Empty states for at least so many tokens, of one of few sizes.

    Args:
        made: By their size. They are used again, since CUDA graphs know the addresses of their tensors.
    """
    length = MIN_CACHE_LENGTH
    while length < num_tokens:
        length *= 2
    if length not in made:
        made[length] = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
    made[length].reset()
    return made[length]


def build_compile_config(device: torch.device) -> CompileConfig:
    """What `generate` is told; nothing but the size of the states ever changes shape."""
    options = {"triton.cudagraphs": True, "coordinate_descent_tuning": True} if device.type == "cuda" else None
    config = CompileConfig(fullgraph=True, dynamic=False, mode=None, options=options)
    # Otherwise generate compiles on GPUs only.
    config._compile_all_devices = True
    return config


def decode_ahead(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    streamer: BaseStreamer | None = None,
    **model_kwargs,
) -> torch.LongTensor:
    """The likeliest tokens, for `generate(custom_generate=decode_ahead)` on static states and rows without padding.

    The loop of `generate` reads each token before it prepares the next step, and a GPU waits meanwhile. Here the host
    reads a token when the step after it runs. An answer that ends before its greatest length has thus taken one step
    too many, after which the states hold its last token too.
    """
    states, pad_token = model_kwargs[KV_CACHE], generation_config._pad_token_tensor
    step = model.get_compiled_call(generation_config.compile_config)
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    is_unfinished_B = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    pending: deque[_Transfer] = deque()
    while True:
        scores_BV = logits_processor(input_ids, outputs.logits[:, -1].to(copy=True, dtype=torch.float32))
        # The next step writes to the same memory.
        del outputs
        tokens_B = scores_BV.argmax(dim=-1)
        if pad_token is not None:
            tokens_B = torch.where(is_unfinished_B, tokens_B, pad_token)
        input_ids = torch.cat([input_ids, tokens_B[:, None]], dim=-1)
        is_unfinished_B = is_unfinished_B & ~stopping_criteria(input_ids, None)
        pending.append(_start_transfer(tokens_B, is_unfinished_B))
        is_longest = input_ids.shape[1] >= stopping_criteria.max_length
        while len(pending) > (0 if is_longest else 1):
            tokens, is_unfinished = pending.popleft().wait()
            if streamer is not None:
                streamer.put(tokens)
            if not is_unfinished.any():
                if streamer is not None:
                    streamer.end()
                return input_ids[:, : input_ids.shape[1] - len(pending)]
        outputs = step(input_ids=tokens_B[:, None], **{KV_CACHE: states}, use_cache=True, return_dict=True)


class _Transfer(NamedTuple):
    """Tensors on their way to the host."""

    tensors: list[torch.Tensor]
    done: torch.Event | None

    def wait(self) -> list[torch.Tensor]:
        if self.done is not None:
            self.done.synchronize()
        return self.tensors


def _start_transfer(*tensors: torch.Tensor) -> _Transfer:
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    device = tensors[0].device
    if device.type == "cpu":
        return _Transfer(copies, None)
    done = torch.Event(device)
    done.record()
    return _Transfer(copies, done)


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
            self.cache.store_prefix(keys[:length], states)

    def _recall_states(self, keys: list[TokenKey], *, max_new_tokens: int) -> Cache | None:
        """States that begin with what is known of a prompt; None where they cannot be reused.

        In a call of its own, so that nothing holds on to the copy that the cache gave while an answer is made.
        """
        if not self.compile:
            past = build_cache(self.model)
        else:
            past = build_static_cache(self.model, len(keys) + max_new_tokens, made=self.cache.static_caches)
        if past is not None:
            # The last token is always computed: the answer begins with its logits.
            self.num_reused_tokens, states = self.cache.find_prefix(keys[:-1])
            for layer, (key_states, value_states) in enumerate(zip(states, states)):
                past.update(key_states, value_states, layer)
        return past

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


def build_cache(model: PreTrainedModel) -> DynamicCache | None:
    """Empty states for `generate`, or None where they cannot be reused."""
    config = model.config.get_text_config(decoder=True)
    rope = config.to_dict().get("rope_parameters") or {}
    rope_types = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if model.generation_config.cache_implementation is not None or rope_types & LENGTH_DEPENDENT_ROPE_TYPES:
        return None
    states = DynamicCache(config=config)
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in states.layers):
        return None
    preallocate(states)
    return states


def check_compiles(model: PreTrainedModel) -> None:
    """Refuse a model whose decoding cannot be compiled.

    Raises:
        ValueError: saying why.
    """
    language_model = model.base_model.language_model
    states = build_cache(model)
    if states is None:
        raise ValueError(
            f"got compile=True for a {type(language_model).__name__}; expected a language model whose KV cache can be "
            "reused: leave compile out"
        )
    if any(type(layer) is DynamicSlidingWindowLayer for layer in states.layers):
        raise ValueError(
            "got compile=True for a language model with a sliding window, whose states count their tokens in numbers "
            "that a graph holds fixed; expected full attention: leave compile out"
        )
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
