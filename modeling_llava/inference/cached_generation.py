"""CachedGeneration: `generate` that computes only what a ChatCache does not hold, and decoding with compiled code.

Keys and values are reused where the KV cache can be cut after any token: full attention, and sliding windows until a
conversation outgrows them. Quantized and recurrent caches are computed again, and so are those whose position
embeddings depend on the length of the conversation. Image features are always reused.

Compiled decoding has a KV cache of fixed size, so that one graph serves every token and every turn. The decode steps
are compiled; the prefill is not, since every prompt has another length. On a GPU the steps become CUDA graphs. A step
reads every weight for one row, so its time is that of reading memory. As in PyTorch's gpt-fast, the compiler therefore
writes the kernels of the products itself and tunes them (`coordinate_descent_tuning`), three products of one input in
one, with the norms around them. Attention of one token is written as products (`cpu_layers`), which it fuses in the
same way.
"""

from collections import deque
from functools import partial

import torch
from transformers import (
    BatchFeature,
    Cache,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_llava.acceleration.cpu_layers import Int8Linear, PackedLinear
from modeling_llava.generation import preallocate
from processing_llava.transformers_versions import KV_CACHE

from .chat_cache import ChatCache, PromptImage, TokenKey, iterate_unknown, key_tokens, load_features, read_images

LENGTH_DEPENDENT_ROPE_TYPES = {"dynamic", "longrope"}
"""Position embeddings of the first tokens change when a conversation grows long (transformers 5.23,
modeling_rope_utils.py, dynamic_rope_update)."""
MIN_CACHE_LENGTH = 1024
"""Length of the shortest static cache, in tokens: an image of 576 and a few turns. Longer ones have twice as many, and
so on, and are compiled anew."""


class CachedGeneration:
    """The answer to one prompt.

    Args:
        model: A LLaVA of our class, in evaluation mode.
        inputs: What the processor returns for one conversation.
        cache: The cache of this model.
        scope: Entries of the cache that were made under another scope are not found.
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
        """As greedy `model.generate(**inputs, **settings)`; the lock of the cache must be held."""
        settings |= {"max_new_tokens": max_new_tokens, "use_cache": True, "do_sample": False}
        device = self.model.device
        images = read_images(self.model, self.inputs, scope=self.scope)
        keys = key_tokens(self.inputs["input_ids"][0].tolist(), images, self.scope)
        past = self._recall(keys, max_new_tokens=max_new_tokens)
        if past is not None:
            settings[KV_CACHE] = past
        if self.compile:
            settings["compile_config"] = build_compile_config(device)
            # A custom loop is not given the streamer (transformers 5.23, generation/utils.py,
            # _extract_generation_mode_kwargs).
            settings["custom_generate"] = partial(decode_ahead, streamer=settings.get("streamer"))
        features = self._load_features(images)
        if features:
            settings["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        text = {name: self.inputs[name].to(device) for name in ("input_ids", "attention_mask")}
        output_ids = self.model.generate(**text, **settings)
        length = 0 if past is None else int(past.get_seq_length())
        # A sliding window that is full has dropped the first tokens.
        if past is not None and all(layer.keys.shape[-2] >= length for layer in past.layers):
            keys += output_ids[0, len(keys) :].tolist()
            tensors = [tensor[..., :length, :] for layer in past.layers for tensor in (layer.keys, layer.values)]
            # The ChatCache copies one tensor after the other, and frees each if nothing else holds it.
            del past, settings
            # The last token of an answer has never been an input.
            self.cache.store_prefix(keys[:length], tensors)

    def _recall(self, keys: list[TokenKey], *, max_new_tokens: int) -> Cache | None:
        """A KV cache that holds the known beginning of a prompt; None where it cannot be reused.

        A method of its own, so that no variable keeps the copies of the ChatCache alive during the answer.
        """
        if not self.compile:
            past = build_cache(self.model)
        else:
            past = build_static_cache(self.model, len(keys) + max_new_tokens, made=self.cache.static_caches)
        if past is not None:
            # The last token is always computed: the answer begins with its logits.
            self.num_reused_tokens, tensors = self.cache.find_prefix(keys[:-1])
            for layer, (layer_keys, layer_values) in enumerate(zip(tensors, tensors)):
                past.update(layer_keys, layer_values, layer)
        return past

    def _load_features(self, images: list[PromptImage]) -> list[torch.Tensor]:
        """Features of the image tokens whose keys and values are not reused, in reading order."""
        unknown = list(iterate_unknown(images, self.num_reused_tokens))
        features = load_features(self.model, self.cache, [(image, self.inputs) for image, _ in unknown])
        return [image_features[start:] for image_features, (_, start) in zip(features, unknown)]


def build_cache(model: PreTrainedModel) -> DynamicCache | None:
    """An empty KV cache for `generate`; None where it could not be reused."""
    config = model.config.get_text_config(decoder=True)
    rope = config.to_dict().get("rope_parameters") or {}
    rope_types = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if model.generation_config.cache_implementation is not None or rope_types & LENGTH_DEPENDENT_ROPE_TYPES:
        return None
    cache = DynamicCache(config=config)
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    preallocate(cache)
    return cache


def check_compiles(model: PreTrainedModel) -> None:
    """Refuse a model whose decoding cannot be compiled.

    Raises:
        ValueError: saying why.
    """
    language_model = model.base_model.language_model
    cache = build_cache(model)
    if cache is None:
        raise ValueError(
            f"got compile=True for a {type(language_model).__name__}; expected a language model whose KV cache can be "
            "reused: leave compile out"
        )
    if any(type(layer) is DynamicSlidingWindowLayer for layer in cache.layers):
        raise ValueError(
            "got compile=True for a language model with a sliding window, whose static cache counts its tokens in "
            "Python, which a graph holds fixed; expected full attention: leave compile out"
        )
    if not language_model._can_compile_fullgraph:
        raise ValueError(
            f"got compile=True for a {type(language_model).__name__}; expected a language model that runs on a static "
            "KV cache: leave compile out"
        )
    decoder = [*language_model.modules(), model.get_output_embeddings()]
    if any(isinstance(module, (Int8Linear, PackedLinear)) for module in decoder):
        raise ValueError(
            "got compile=True for a model that was loaded for answering on a CPU; expected one on a GPU: leave "
            "compile out"
        )


def build_static_cache(model: PreTrainedModel, num_tokens: int, *, made: dict[int, StaticCache]) -> StaticCache:
    """An empty static cache for at least so many tokens, of one of few lengths.

    Args:
        model: The model whose cache it is.
        num_tokens: Tokens that it must have room for.
        made: Those that exist, by their length. They are reused, since CUDA graphs hold the addresses of their
            tensors.
    """
    length = MIN_CACHE_LENGTH
    while length < num_tokens:
        length *= 2
    if length not in made:
        made[length] = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
    made[length].reset()
    return made[length]


def build_compile_config(device: torch.device) -> CompileConfig:
    """The setting of `generate`; no shape ever changes but that of the KV cache."""
    options = {"triton.cudagraphs": True, "coordinate_descent_tuning": True} if device.type == "cuda" else None
    config = CompileConfig(fullgraph=True, dynamic=False, mode=None, options=options)
    # `generate` compiles on accelerators only without it (transformers 5.23, generation/utils.py,
    # _valid_auto_compile_criteria).
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
    """Greedy tokens, for `generate(custom_generate=decode_ahead)` on a static cache and rows without padding.

    The loop of `generate` reads each token before it prepares the next step, and a GPU waits meanwhile; it reads one
    step late on MPS only (transformers 5.23, generation/utils.py, DeferredStopCheck). Here the host reads a token when
    the step after it runs. An answer that ends before its greatest length has thus taken one step too many, after
    which the KV cache holds its last token too.
    """
    cache, pad_token = model_kwargs[KV_CACHE], generation_config._pad_token_tensor
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
        pending.append(_Transfer(tokens_B, is_unfinished_B))
        is_longest = input_ids.shape[1] >= stopping_criteria.max_length
        while len(pending) > (0 if is_longest else 1):
            tokens, is_unfinished = pending.popleft().wait()
            if streamer is not None:
                streamer.put(tokens)
            if not is_unfinished.any():
                if streamer is not None:
                    streamer.end()
                return input_ids[:, : input_ids.shape[1] - len(pending)]
        outputs = step(input_ids=tokens_B[:, None], **{KV_CACHE: cache}, use_cache=True, return_dict=True)


class _Transfer:
    """Tensors on their way to the host."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self.done: torch.Event | None = None
        device = tensors[0].device
        if device.type != "cpu":
            self.done = torch.Event(device)
            self.done.record()

    def wait(self) -> list[torch.Tensor]:
        if self.done is not None:
            self.done.synchronize()
        return self.tensors
