"""ModelMenu: models by name, loaded when somebody asks for them and there is memory for them."""

import gc
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

import torch
from transformers import PreTrainedModel

from modeling_llava.acceleration.cpu_layers import Int8Linear
from modeling_llava.acceleration.devices import count_free_bytes
from modeling_llava.checkpoints.model_names import explain_missing
from modeling_llava.inference.chat_cache import ChatCache
from modeling_llava.inference.generation_memory import build_without_memory, count_weight_bytes, read_config
from modeling_llava.inference.loading import (
    EMBEDDED_MODEL,
    choose_dtype,
    find_device,
    load_for_inference,
    read_dtype,
)
from processing_llava.processing_llava import AnyLlavaProcessor

GIB = 2**30
HEADROOM = GIB // 2
"""Memory beside the weights and the caches: KV cache and activations of an answer."""
MAX_CACHE_BYTES = 2 * GIB
"""Largest cache of one model, where there is so much memory."""


class MemoryShort(ValueError):
    """Too little memory; the message names no folder of the machine."""


@dataclass(frozen=True)
class LoadedModel:
    model: PreTrainedModel
    processor: AnyLlavaProcessor
    cache: ChatCache

    @property
    def num_bytes(self) -> int:
        """Size of the weights and of the cache."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        packed = (layer for layer in self.model.modules() if isinstance(layer, Int8Linear))
        num_packed = sum(layer.in_features * layer.out_features for layer in packed)
        return sum(tensor.nbytes for tensor in tensors) + num_packed + self.cache.num_bytes

    def describe(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        size = f"{self.model.num_parameters() / 1e6:,.0f} million parameters in {dtype} on {self.model.device}"
        return f"{size}, tile mode {self.processor.image_processor.image_aspect_ratio}"


class ModelMenu:
    """Models by the label that visitors and clients see.

    Args:
        names: Folders (full checkpoints or adapters) or Hub ids; the embedded model by default.
        device: As in `load_for_inference`.
        free_bytes: Tells how much memory a device has left.
        **settings: Others of `load_for_inference`, for every model.

    Raises:
        ValueError: if there is no such device.
    """

    def __init__(
        self,
        names: list[str],
        *,
        device: str | None = None,
        free_bytes: Callable[[torch.device], int] = count_free_bytes,
        **settings,
    ) -> None:
        self.names = _label(names or [EMBEDDED_MODEL])
        self.device = find_device(device)
        self.free_bytes = free_bytes
        self.settings = settings
        self.loaded: dict[str, LoadedModel] = {}
        """Least recently used first."""
        # A visitor who leaves may come back while the thread that loads goes on.
        self._lock = Lock()

    @property
    def labels(self) -> list[str]:
        return list(self.names)

    def load(self, label: str, *, keep: Collection[str] = ()) -> LoadedModel:
        """A model, loaded if it is not; what was used least recently makes room for it.

        Args:
            keep: Labels whose models must stay.

        Raises:
            MemoryShort: in one line, if memory is short.
            ValueError: in one line, if there is no such model or it cannot be loaded; it may name folders.
        """
        with self._lock:
            if label not in self.loaded:
                self._make_room(label, keep=keep)
                try:
                    model, processor = load_for_inference(self.names[label], device=str(self.device), **self.settings)
                    self.loaded[label] = LoadedModel(model, processor, ChatCache())
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    raise MemoryShort(f"got too little memory for {label}; choose a smaller model") from error
                finally:
                    free_memory()
                self._share_memory()
            self.loaded[label] = self.loaded.pop(label)
            return self.loaded[label]

    def drop(self, label: str) -> None:
        """Take a model out of memory."""
        self.loaded.pop(label)

    def _make_room(self, label: str, *, keep: Collection[str]) -> None:
        needed = estimate_bytes(self.names[label], self.device, **self.settings) + HEADROOM
        others = [other for other in self.loaded if other not in keep]
        reachable = self.free_bytes(self.device) + sum(self.loaded[other].num_bytes for other in others)
        reachable += sum(self.loaded[kept].cache.num_bytes for kept in keep if kept in self.loaded)
        if reachable < needed:
            raise MemoryShort(
                f"got {reachable / GIB:.1f} GiB of memory on {self.device}; {label} needs {needed / GIB:.1f}; "
                "choose a smaller model or close other programs"
            )
        sacrifices = [loaded.cache.clear for loaded in self.loaded.values()]
        sacrifices += [partial(self.drop, other) for other in others]
        for give_up in sacrifices:
            if self.free_bytes(self.device) < needed:
                give_up()
                free_memory()

    def _share_memory(self) -> None:
        """Let caches together take no more than what the weights leave."""
        caches = [loaded.cache for loaded in self.loaded.values()]
        room = self.free_bytes(self.device) + sum(cache.num_bytes for cache in caches) - HEADROOM
        for cache in caches:
            cache.resize(max(0, min(MAX_CACHE_BYTES, room // len(caches))))


@contextmanager
def sparing_cache(loaded: LoadedModel) -> Iterator[None]:
    """Clear the cache if memory runs out, for the next try."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        loaded.cache.clear()
        free_memory()
        raise MemoryShort("got too little memory for this conversation; try again, or begin anew") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: on a CPU, that is a RuntimeError with this text (torch 2.13, alloc_cpu.cpp)."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator: " in str(error)


def estimate_bytes(
    name: str, device: torch.device, *, dtype: str | None = None, quantization: str | None = None, **settings
) -> int:
    """Bytes of a model's weights as `load_for_inference` holds them, from its configuration alone.

    Args:
        name: Folder or Hub id.
        device: Where the model will be.
        dtype: As in `load_for_inference`, and so are all others.

    Raises:
        ValueError: if there is no such model.
    """
    with explain_missing(name):
        config = read_config(name)
    chosen = choose_dtype(config, device, quantization=quantization) if dtype is None else read_dtype(dtype)
    return count_weight_bytes(build_without_memory(config, chosen), quantization)


def _label(names: list[str]) -> dict[str, str]:
    """Names that tell a visitor nothing about the folders of the machine."""
    labels = {}
    for name in dict.fromkeys(names):
        path = Path(name)
        if path.is_dir():
            path = path.resolve()
            label = "embedded" if path == Path(EMBEDDED_MODEL).resolve() else path.name
        else:
            label = name
        namesakes = sum(known == label or known.startswith(f"{label} (") for known in labels)
        labels[f"{label} ({namesakes + 1})" if namesakes else label] = name
    return labels


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
