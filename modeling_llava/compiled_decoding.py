"""Decoding with compiled code: states of fixed size, so that one graph serves every token and every turn.

Only the steps of one token are compiled; a prompt has another length every time and takes few steps. On a GPU the
steps become CUDA graphs, which the host starts at once instead of kernel by kernel.
"""

import torch
from transformers import CompileConfig, PreTrainedModel, StaticCache

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
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    config = CompileConfig(fullgraph=True, dynamic=False, mode=mode)
    # Otherwise generate compiles on GPUs only.
    config._compile_all_devices = True
    return config
