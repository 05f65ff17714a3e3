"""Timing one generation: encoding, the first token, and the tokens after it."""

from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_llava.acceleration.cpu_layers import use_cpu_attention
from modeling_llava.inference.cached_generation import (
    MIN_CACHE_LENGTH,
    build_compile_config,
    build_static_cache,
    decode_ahead,
)
from processing_llava.transformers_versions import KV_CACHE

from .models import IMAGE_TOKEN_ID, NUM_TEXT_TOKENS
from .timing import clock


class FirstTokenClock(StoppingCriteria):
    """Records when the first token came; the clock waits for the device, which would slow down later steps."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.time: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs) -> torch.BoolTensor:
        if self.time is None:
            self.time = clock(self.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def build_prompt(batch: int, features: list[torch.Tensor], device: str) -> dict[str, Any]:
    """Rows of images and a text, with the features of the images, `[N, D]` each."""
    text = torch.randint(3, IMAGE_TOKEN_ID, (NUM_TEXT_TOKENS - 1,), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, *[IMAGE_TOKEN_ID] * sum(map(len, features)), *text.tolist()]], device=device).expand(
        batch, -1
    )
    encoded = BaseModelOutputWithPooling(pooler_output=features * batch)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_encoder_outputs": {"image": encoded}}


def compile_ours(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `generate` with which it does as `ChatSession(compile=True)`."""
    use_cpu_attention(model.base_model.language_model)
    compiled = {"compile_config": build_compile_config(model.device), "custom_generate": decode_ahead}
    return build_cache(model) | compiled


def compile_peer(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `generate` with which it compiles as by default, and in one graph."""
    config = CompileConfig(fullgraph=True, dynamic=False)
    # `generate` compiles on accelerators only without it (transformers 5.23, generation/utils.py,
    # _valid_auto_compile_criteria).
    config._compile_all_devices = True
    return build_cache(model) | {"compile_config": config}


def build_cache(model: PreTrainedModel) -> dict[str, Any]:
    """A static cache for all rounds: CUDA graphs hold its addresses, and would be captured anew for another one."""
    return {KV_CACHE: build_static_cache(model, MIN_CACHE_LENGTH, made={})}


def generate(model: PreTrainedModel, prompt: dict, num_tokens: int, device: str, **settings) -> tuple[float, list]:
    """Seconds from the first new token to the last one, and the tokens."""
    first_token = FirstTokenClock(device)
    if KV_CACHE in settings:
        settings[KV_CACHE].reset()
    ids = model.generate(
        **prompt,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([first_token]),
        **settings,
    )
    return clock(device) - first_token.time, ids[:, prompt["input_ids"].shape[1] :].tolist()


def time_encoding(model: PreTrainedModel, pixels: torch.Tensor, device: str) -> float:
    start = clock(device)
    with torch.no_grad():
        model.get_image_features(pixels, return_dict=True)
    return clock(device) - start


def time_prefill(model: PreTrainedModel, prompt: dict, device: str) -> float:
    start = clock(device)
    generate(model, prompt, 1, device)
    return clock(device) - start


def time_decoding(model: PreTrainedModel, prompt: dict, num_tokens: int, device: str, **settings) -> float:
    return generate(model, prompt, num_tokens, device, **settings)[0]
