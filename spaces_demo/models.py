"""ModelMenu: the models of the demo, loaded when somebody asks for them and there is memory for them."""

import gc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from transformers import PreTrainedModel

from modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.acceleration.devices import count_free_bytes
from modeling_llava.checkpoints.model_names import explain_missing
from modeling_llava.inference.attention_map import AnswerAttention, read_attention
from modeling_llava.inference.chat_cache import ChatCache
from modeling_llava.inference.chat_session import AnswerStatistics, ChatSession
from modeling_llava.inference.generation_memory import read_config
from modeling_llava.inference.loading import EMBEDDED_MODEL, choose_dtype, find_device, load_for_inference
from processing_llava.processing_llava import AnyLlavaProcessor
from processing_llava.templates import change_template

GIB = 2**30
HEADROOM = GIB // 2
"""Memory beside the weights and the caches: KV cache and activations of an answer."""
MAX_CACHE_BYTES = 2 * GIB
"""Largest cache of one model, where there is so much memory."""
AS_TRAINED = "as trained"


@dataclass(frozen=True)
class Settings:
    """Choices of a visitor."""

    template: str = AS_TRAINED
    """Name of a conversation format."""
    tile_mode: str = AS_TRAINED
    """An `image_aspect_ratio` of the image processor."""
    system: str = ""
    """System text instead of that of the template."""
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def adapt(self, processor: AnyLlavaProcessor) -> AnyLlavaProcessor:
        """The processor with this template and tile mode; the given one is left as it is."""
        processor = copy(processor)
        if self.template != AS_TRAINED:
            processor.chat_template = change_template(processor.chat_template, self.template)
        if self.tile_mode != AS_TRAINED:
            if self.tile_mode == "anyres" and not processor.image_processor.image_grid_pinpoints:
                raise ValueError("got tile mode 'anyres' for a model of one tile; choose 'pad' or 'square'")
            processor.image_processor = copy(processor.image_processor)
            processor.image_processor.image_aspect_ratio = self.tile_mode
        return processor


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
        return sum(tensor.nbytes for tensor in self.model.state_dict().values()) + self.cache.num_bytes

    def describe(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        size = f"{self.model.num_parameters() / 1e6:,.0f} million parameters in {dtype} on {self.model.device}"
        return f"{size}, tile mode {self.processor.image_processor.image_aspect_ratio}"


class ModelMenu:
    """Models by the label that the page shows. One answer at a time: Gradio's queue sees to that.

    Args:
        names: Folders (full checkpoints or adapters) or Hub ids; the embedded model by default.
        device: As in `load_for_inference`.
        free_bytes: Tells how much memory a device has left.

    Raises:
        ValueError: if there is no such device.
    """

    def __init__(
        self,
        names: list[str],
        *,
        device: str | None = None,
        free_bytes: Callable[[torch.device], int] = count_free_bytes,
    ) -> None:
        self.names = _label(names or [EMBEDDED_MODEL])
        self.device = find_device(device)
        self.free_bytes = free_bytes
        self.loaded: dict[str, LoadedModel] = {}
        """Least recently used first."""
        # Gradio takes a visitor who leaves out of its queue while the thread that loads goes on.
        self._lock = Lock()

    @property
    def labels(self) -> list[str]:
        return list(self.names)

    def load(self, label: str, *, beside: str | None = None) -> LoadedModel:
        """A model, loaded if it is not; what was used least recently makes room for it.

        Args:
            beside: A label whose model must stay.

        Raises:
            MemoryShort: in one line, if memory is short.
            ValueError: in one line, if there is no such model or it cannot be loaded; it may name folders.
        """
        with self._lock:
            if label not in self.loaded:
                self._make_room(label, beside=beside)
                try:
                    model, processor = load_for_inference(self.names[label], device=str(self.device))
                    self.loaded[label] = LoadedModel(model, processor, ChatCache())
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    raise MemoryShort(f"got too little memory for {label}; choose a smaller model") from error
                finally:
                    _free_memory()
                self._share_memory()
            self.loaded[label] = self.loaded.pop(label)
            return self.loaded[label]

    def answer(
        self, label: str, messages: list[dict[str, Any]], settings: Settings, *, scope: bytes = b""
    ) -> Iterator[tuple[str, AnswerStatistics | None]]:
        """The answer so far, again and again; statistics come with the last one.

        Args:
            scope: As in `ChatSession`.

        Raises:
            ValueError: if the model, a picture or a setting is refused, or memory is short.
        """
        loaded = self.load(label)
        processor = settings.adapt(loaded.processor)
        session = ChatSession(loaded.model, processor, system=settings.system or None, cache=loaded.cache, scope=scope)
        numbers = {name: getattr(settings, name) for name in ("temperature", "top_p", "max_new_tokens", "seed")}
        text = ""
        with _sparing_cache(loaded), closing(session.answer(messages, **numbers)) as pieces:
            for piece in pieces:
                text += piece
                yield text, None
        yield text, session.statistics

    def look(self, label: str, messages: list[dict[str, Any]], settings: Settings) -> AnswerAttention:
        """What the model looked at while it wrote the last answer of a conversation."""
        loaded = self.load(label)
        if settings.system:
            messages = [{"role": "system", "content": settings.system}, *messages]
        # No answer of this model may run while its attention function is switched.
        with _sparing_cache(loaded), loaded.cache.lock:
            return read_attention(loaded.model, settings.adapt(loaded.processor), messages)

    def _make_room(self, label: str, *, beside: str | None) -> None:
        needed = estimate_bytes(self.names[label], self.device) + HEADROOM
        others = [other for other in self.loaded if other != beside]
        reachable = self.free_bytes(self.device) + sum(self.loaded[other].num_bytes for other in others)
        if beside in self.loaded:
            reachable += self.loaded[beside].cache.num_bytes
        if reachable < needed:
            raise MemoryShort(
                f"got {reachable / GIB:.1f} GiB of memory on {self.device}; {label} needs {needed / GIB:.1f}; "
                "choose a smaller model or close other programs"
            )
        sacrifices = [loaded.cache.clear for loaded in self.loaded.values()]
        sacrifices += [partial(self.loaded.pop, other) for other in others]
        for give_up in sacrifices:
            if self.free_bytes(self.device) < needed:
                give_up()
                _free_memory()

    def _share_memory(self) -> None:
        """Let caches together take no more than what the weights leave."""
        caches = [loaded.cache for loaded in self.loaded.values()]
        room = self.free_bytes(self.device) + sum(cache.num_bytes for cache in caches) - HEADROOM
        for cache in caches:
            cache.resize(max(0, min(MAX_CACHE_BYTES, room // len(caches))))


@contextmanager
def _sparing_cache(loaded: LoadedModel) -> Iterator[None]:
    """Clear the cache if memory runs out, for the next try."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        loaded.cache.clear()
        _free_memory()
        raise MemoryShort("got too little memory for this conversation; try again, or begin anew") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: on a CPU, that is a RuntimeError with this text (torch 2.13, alloc_cpu.cpp)."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator: " in str(error)


def estimate_bytes(name: str, device: torch.device) -> int:
    """Bytes of a model's weights as `load_for_inference` holds them, from its configuration alone.

    Raises:
        ValueError: if there is no such model.
    """
    with explain_missing(name):
        config = read_config(name)
    with torch.device("meta"):
        model = AnyLlavaForConditionalGeneration(config)
    num_weights = sum(tensor.numel() for tensor in model.state_dict().values())
    return num_weights * choose_dtype(config, device).itemsize


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


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
