"""Decoding with compiled code: states of fixed size, so that one graph serves every token and every turn.

Only the steps of one token are compiled; a prompt has another length every time and takes few steps. On a GPU the
steps become CUDA graphs, which the host starts at once instead of kernel by kernel.

A step reads every weight for one row, so that nothing counts but the rate at which weights and states are read. As in
PyTorch's gpt-fast, products with a single row are therefore no calls of a library: with `coordinate_descent_tuning`
the compiler writes and tunes kernels for them, three products of one input in one, with the norms around them. And
attention of one token is written as products (`token_attention`), which it fuses in the same way.
"""

from collections import deque
from typing import NamedTuple

import torch
from transformers import CompileConfig, GenerationConfig, LogitsProcessorList, PreTrainedModel, StaticCache
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from processing_llava.transformers_versions import KV_CACHE

SMALLEST_LENGTH = 1024
"""Of the states, in tokens: an image of 576 and a few turns. Longer ones double it, and are compiled anew."""


def build_static_states(model: PreTrainedModel, num_tokens: int, *, made: dict[int, StaticCache]) -> StaticCache:
    """Empty states for at least so many tokens, of one of few sizes.

    Args:
        made: By their size. They are used again, since CUDA graphs know the addresses of their tensors.
    """
    length = SMALLEST_LENGTH
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
