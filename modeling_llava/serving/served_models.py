"""ServedModels: the models of a server, each with its batch, within a budget of memory.

Half of what a model leaves of the memory is for the KV cache of its batch, and what that does not need for what is
kept between answers.
"""

from collections.abc import Callable, Collection
from threading import Lock
from types import MappingProxyType

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from modeling_llava.acceleration.devices import count_free_bytes, format_bytes
from modeling_llava.inference.batched_generation import BatchedGeneration
from processing_llava.data.image_urls import UrlPolicy
from processing_llava.image_limits import DEFAULT_LIMITS, ImageLimits

from .engine_thread import EngineThread
from .model_menu import HEADROOM, LoadedModel, MemoryShort, ModelMenu

logger = logging.get_logger(__name__)

MIN_CACHE_TOKENS = 1024
"""One request with a picture and a short answer; a batch with less would refuse it."""


class ServedModels:
    """Models by name; one that is asked for is loaded, and those that answer nobody make room for it.

    Args:
        names: As in `ModelMenu`.
        device: As in `load_for_inference`.
        memory: Bytes that models and caches may take; what is free by default.
        max_rows: Requests that a model answers at the same time.
        max_cache_tokens: Tokens of its KV cache, where there is memory for them.
        max_waiting: Requests that may wait for each model.
        limits: Which pictures are refused.
        urls: Which URLs of pictures are fetched; none by default.
        **settings: Others of `load_for_inference`.
    """

    def __init__(
        self,
        names: list[str],
        *,
        device: str | None = None,
        memory: int | None = None,
        max_rows: int = 16,
        max_cache_tokens: int = 16384,
        max_waiting: int = 64,
        limits: ImageLimits = DEFAULT_LIMITS,
        urls: UrlPolicy | None = None,
        **settings,
    ) -> None:
        self.max_rows = max_rows
        self.max_cache_tokens = max_cache_tokens
        self.max_open = max_rows + max_waiting
        self.limits = limits
        self.urls = urls
        self._menu = _Menu(names, device=device, free_bytes=self._build_budget(memory), **settings)
        self._lock = Lock()

    @property
    def names(self) -> list[str]:
        return self._menu.labels

    @property
    def engines(self) -> MappingProxyType[str, EngineThread]:
        """Of the models that are loaded."""
        return MappingProxyType(self._menu.engines)

    def count_cache_bytes(self) -> int:
        return sum(engine.batch.cache.num_bytes for engine in self.engines.values())

    def load(self, name: str) -> EngineThread:
        """The engine of a model.

        Raises:
            MemoryShort: if memory is short while other models answer.
            ValueError: if the model cannot be loaded.
        """
        with self._lock:
            if name not in self._menu.engines:
                busy = [label for label, engine in self._menu.engines.items() if engine.num_open]
                self._menu.engines[name] = self._build_engine(name, self._menu.load(name, keep=busy))
            return self._menu.engines[name]

    def close(self) -> None:
        """Finish what is running."""
        with self._lock:
            for engine in self._menu.engines.values():
                engine.close()

    def _build_engine(self, name: str, loaded: LoadedModel) -> EngineThread:
        try:
            num_tokens = self._choose_cache_tokens(name, loaded)
        except MemoryShort:
            self._menu.drop(name)
            raise
        image_processor = loaded.processor.image_processor
        image_processor.limits, image_processor.urls = self.limits, self.urls
        batch = BatchedGeneration(
            loaded.model,
            loaded.processor,
            max_rows=self.max_rows,
            max_cache_tokens=num_tokens,
            cache=loaded.cache,
        )
        return EngineThread(batch, max_open=self.max_open)

    def _choose_cache_tokens(self, name: str, loaded: LoadedModel) -> int:
        """Tokens of the KV cache of a batch, for which memory is set aside.

        Raises:
            MemoryShort: if there is none for one request.
        """
        size = count_token_bytes(loaded.model)
        free = max(0, self._menu.free_bytes(self._menu.device) - HEADROOM)
        num_tokens = min(self.max_cache_tokens, free // 2 // size)
        if num_tokens < min(self.max_cache_tokens, MIN_CACHE_TOKENS):
            needed = format_bytes(2 * MIN_CACHE_TOKENS * size)
            raise MemoryShort(
                f"got {format_bytes(free)} beside {name}; expected {needed} for one answer at a time: close other "
                "programs, or take fewer bits (--quantization)"
            )
        if num_tokens < self.max_cache_tokens:
            logger.warning(
                f"{name} answers within {num_tokens:,} tokens at a time ({format_bytes(num_tokens * size)}), not "
                f"{self.max_cache_tokens:,}: {format_bytes(free)} are free"
            )
        self._menu.reserved[name] = num_tokens * size
        loaded.cache.resize(min(loaded.cache.max_bytes, free - num_tokens * size))
        return num_tokens

    def _build_budget(self, memory: int | None) -> Callable[[torch.device], int]:
        def count(device: torch.device) -> int:
            free = count_free_bytes(device)
            if memory is None:
                return free
            held = sum(loaded.num_bytes for loaded in self._menu.loaded.values())
            return min(free, memory - held - sum(self._menu.reserved.values()))

        return count


def count_token_bytes(model: PreTrainedModel) -> int:
    """Bytes of keys and values of one token."""
    config = model.config.get_text_config(decoder=True).to_dict()
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_width = config.get("head_dim") or width // heads
    num_shared = config.get("num_key_value_heads") or heads
    return 2 * config["num_hidden_layers"] * num_shared * head_width * model.dtype.itemsize


class _Menu(ModelMenu):
    """A menu whose models have an engine, which ends before its model goes."""

    def __init__(self, names: Collection[str], **settings) -> None:
        super().__init__(list(names), **settings)
        self.engines: dict[str, EngineThread] = {}
        self.reserved: dict[str, int] = {}
        """Bytes that the KV caches of batches may grow to."""

    def drop(self, label: str) -> None:
        if label in self.engines:
            self.engines.pop(label).close()
        self.reserved.pop(label, None)
        super().drop(label)
