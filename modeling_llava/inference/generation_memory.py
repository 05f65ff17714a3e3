"""How much memory loading and generating take, known before a weight is loaded.

    weights      parameters and buffers
    cache        the KV cache of all tokens, at the end of the answer
    activations  what lives beside them at the largest moment: while images are encoded, in the prefill, or in the
                 last decode step. The KV cache is shorter in the first two, and its missing part counts as free.

The model computes on tensors without content (PyTorch's FakeTensorMode), and those that live at once are added up. So
nothing here knows how a tower or a language model is built, and no memory is needed. Three things are not counted: the
CUDA context (about 0.5 GiB), what allocators lose between blocks, and the work space inside single operations.
"""

import copy
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import DynamicCache

from modeling_llava.acceleration.fused_layers import fuse_projections
from modeling_llava.checkpoints.layouts import translate_config
from modeling_llava.configuration_llava import AnyLlavaConfig
from modeling_llava.generation import count_spare_tokens
from modeling_llava.modeling_llava import AnyLlavaForConditionalGeneration
from processing_llava.anyres_layout import ImageLayout
from processing_llava.original.file_checks import in_one_line
from processing_llava.original.original_folder import find_installed, recognise
from processing_llava.transformers_versions import KV_CACHE


@dataclass(frozen=True, kw_only=True)
class GenerationMemory:
    """Bytes that generating takes on one device."""

    weights: int
    cache: int
    activations: int
    num_prompt_tokens: int
    """Tokens of the prompt of one row, image tokens included."""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations


@in_one_line()
def read_config(
    name: str,
    *,
    base_model: str | None = None,
    vision_tower: str | None = None,
    visual_tokens: int | None = None,
) -> AnyLlavaConfig:
    """The configuration of a LLaVA in any layout, without its weights.

    Args:
        name: Folder or Hub id. An adapter has the configuration of its base.
        base_model: Folder or Hub id of the language model, for a folder that does not name its own.
        vision_tower: Folder or Hub id of the tower, instead of the one that an original folder names.
        visual_tokens: Most tokens of an image, instead of the number stored with the model.

    Raises:
        ValueError: if it is another model.
        OSError: if there is none.
    """
    name = find_installed(name)
    found = recognise(name, {}, base_model=base_model)
    if found.layout == "adapter":
        return read_config(found.base, visual_tokens=visual_tokens)
    if not found.raw:
        raise OSError(f"there is no config.json in {name}")
    parts = {"base_model": base_model, "vision_tower": vision_tower}
    config = AnyLlavaConfig.from_dict(translate_config(found.raw, name=name, **parts))
    config.visual_tokens = config.visual_tokens if visual_tokens is None else visual_tokens
    return config


WEIGHT_BITS = {"int8": 8, "fp8": 8, "int4": 4.25, "nf4": 4.13}
"""Bits of a parameter of a quantized language model, with its share of the scale of 128 or 64 parameters."""


def predict_loading(
    config: AnyLlavaConfig,
    *,
    dtype: torch.dtype,
    quantization: str | None = None,
    num_threads: int = 1,
    model: AnyLlavaForConditionalGeneration | None = None,
) -> int:
    """Bytes at the largest moment of loading on a CPU, where weights are converted as they are read.

    Beside the weights there is the largest matrix once more, in which the kernels read it; in int8, for each thread,
    the largest one that is fused, in the dtype of its file and in integers.

    Args:
        config: Configuration of the model; its dtype is that of the files.
        dtype: As `predict_generation` takes it.
        quantization: As `predict_generation` takes it.
        num_threads: Threads that round weights.
        model: What `build_without_memory` made of the configuration; it is changed.
    """
    model = build_without_memory(config, dtype) if model is None else model
    weights = count_weight_bytes(model, quantization)
    if quantization is None:
        return weights + max(parameter.nbytes for parameter in model.parameters())
    stored = dtype if config.dtype is None else config.dtype
    fuse_projections(model.model.language_model)
    rounded = {id(module.weight) for module in model.model.language_model.modules() if type(module) is nn.Linear}
    sizes = [(parameter, id(parameter) in rounded) for parameter in model.parameters()]
    return weights + max(
        max(parameter.nbytes for parameter, is_rounded in sizes if not is_rounded),
        max(num_threads * parameter.numel() * (stored.itemsize + 1) for parameter, is_rounded in sizes if is_rounded),
    )


def predict_generation(
    config: AnyLlavaConfig,
    *,
    dtype: torch.dtype,
    quantization: str | None = None,
    num_images: int = 1,
    num_text_tokens: int = 64,
    num_new_tokens: int = 256,
    num_rows: int = 1,
    model: AnyLlavaForConditionalGeneration | None = None,
) -> GenerationMemory:
    """The memory of `generate` with a cache that grows, for rows of equal length.

    Args:
        config: Configuration of the model.
        dtype: Dtype of its weights.
        quantization: A name of `WEIGHT_BITS`, for the linear layers of the language model.
        num_images: Images of each row. Where images are tiled, each fills the largest grid.
        num_text_tokens: Tokens of the prompt of each row, beside those of its images.
        num_new_tokens: Tokens of each answer.
        num_rows: Rows that are generated together.
        model: What `build_without_memory` made of the configuration; it is changed.

    Raises:
        ValueError: if a number is too small, the quantization is unknown, or the operations of the language model
            depend on its data.
    """
    if quantization is not None and quantization not in WEIGHT_BITS:
        raise ValueError(f"got quantization={quantization!r}; expected one of {', '.join(WEIGHT_BITS)}")
    for name, number, smallest in (
        ("num_images", num_images, 0),
        ("num_text_tokens", num_text_tokens, 1),
        ("num_new_tokens", num_new_tokens, 1),
        ("num_rows", num_rows, 1),
    ):
        if number < smallest:
            raise ValueError(f"got {name}={number}; expected at least {smallest}")
    try:
        model = (build_without_memory(config, dtype) if model is None else model).eval()
        with FakeTensorMode(allow_non_fake_inputs=True), _LiveBytes() as live, torch.no_grad():
            model.to_empty(device="cpu").tie_weights()
            size, layout = _plan_largest_image(model)
            num_prompt_tokens = num_text_tokens + num_images * layout.num_tokens
            live.peak = start = live.current

            images = _encode_images(model, num_images=num_rows * num_images, size=size, num_tiles=layout.num_tiles)
            peaks, live.peak = [live.peak], live.current
            cache = _run_language_model(model, num_rows=num_rows, num_tokens=num_prompt_tokens)
            cached_token = _count_cache_bytes(cache) // num_prompt_tokens
            num_spare_tokens = count_spare_tokens(num_rows)
            peaks.append(live.peak + cached_token * num_spare_tokens)

            # The last token of the answer is never an input.
            num_cached_tokens = num_prompt_tokens + num_new_tokens - 1
            if num_new_tokens > 1:
                cache = _run_language_model(model, num_rows=num_rows, num_tokens=num_cached_tokens - 1)
                live.peak = live.current
                _run_language_model(model, num_rows=num_rows, num_tokens=1, cache=cache)
                room = num_spare_tokens - (num_new_tokens - 1) % (num_spare_tokens + 1)
                peaks.append(live.peak + cached_token * room)
            num_cached = _count_cache_bytes(cache)
            del images
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        model_type = config.text_config.model_type
        raise ValueError(
            f"got a language model of type {model_type!r}, which decides by its data what it computes ({error.func}); "
            "expected one that does not: measure its memory instead"
        ) from error
    return GenerationMemory(
        weights=count_weight_bytes(model, quantization),
        cache=num_cached,
        activations=max(0, max(peaks) - start - num_cached),
        num_prompt_tokens=num_prompt_tokens,
    )


def build_without_memory(config: AnyLlavaConfig, dtype: torch.dtype) -> AnyLlavaForConditionalGeneration:
    """A model of a configuration, on "meta"."""
    with torch.device("meta"):
        # `_from_config` writes the dtype into the configuration (transformers 5.23, modeling_utils.py).
        return AnyLlavaForConditionalGeneration._from_config(copy.deepcopy(config), dtype=dtype)


def count_weight_bytes(model: AnyLlavaForConditionalGeneration, quantization: str | None = None) -> int:
    """Bytes of the parameters and buffers of a model, on "meta" too."""
    num_bytes = sum(tensor.nbytes for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    if quantization is None:
        return num_bytes
    linears = (module for module in model.model.language_model.modules() if type(module) is nn.Linear)
    saved = model.dtype.itemsize - WEIGHT_BITS[quantization] / 8
    return num_bytes - int(saved * sum(linear.weight.numel() for linear in linears))


def _plan_largest_image(model: AnyLlavaForConditionalGeneration) -> tuple[list[int] | None, ImageLayout]:
    """The (height, width) that takes most memory, or None where images are not tiled, and its layout."""
    side = model.config.vision_config.image_size
    sizes = model.config.image_grid_pinpoints
    tile = (3, side, side)
    if sizes is None:
        return None, model.model.plan_images(torch.empty(1, *tile))[0]
    layouts = model.model.plan_images(torch.empty(len(sizes), 1, *tile), sizes)
    return max(zip(sizes, layouts), key=lambda pair: (pair[1].num_tokens, pair[1].num_tiles))


def _count_cache_bytes(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _encode_images(
    model: AnyLlavaForConditionalGeneration, *, num_images: int, size: list[int] | None, num_tiles: int
) -> Any:
    """Pixels and their features, both of which live until the answer ends."""
    if num_images == 0:
        return None
    side = model.config.vision_config.image_size
    tiles, sizes = ((), None) if size is None else ((num_tiles,), [size] * num_images)
    pixel_values = torch.empty(num_images, *tiles, 3, side, side, dtype=model.dtype)
    return pixel_values, model.model.get_image_features(pixel_values, sizes)


def _run_language_model(
    model: AnyLlavaForConditionalGeneration, *, num_rows: int, num_tokens: int, cache: DynamicCache | None = None
) -> DynamicCache:
    """Compute so many tokens, and logits of the last one; returns the KV cache that holds them."""
    cache = DynamicCache(config=model.config.text_config) if cache is None else cache
    embeds_BLD = torch.empty(num_rows, num_tokens, model.config.text_config.hidden_size, dtype=model.dtype)
    outputs = model.model.language_model(inputs_embeds=embeds_BLD, **{KV_CACHE: cache}, use_cache=True)
    model.lm_head(outputs.last_hidden_state[:, -1:]).float()
    return cache


class _LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that live, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, outputs)
        return outputs

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        num_bytes = storage.nbytes()
        self._known[storage] = True
        weakref.finalize(storage, self._free, num_bytes)
        self.current += num_bytes
        self.peak = max(self.peak, self.current)

    def _free(self, num_bytes: int) -> None:
        self.current -= num_bytes
