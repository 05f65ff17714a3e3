"""ServedModels: the models of a server, each with its batch, within a budget of memory."""

from collections.abc import Callable, Collection
from threading import Lock
from types import MappingProxyType

import torch

from modeling_llava.acceleration.devices import count_free_bytes
from modeling_llava.inference.batched_generation import BatchedGeneration
from processing_llava.data.image_urls import UrlPolicy
from processing_llava.image_limits import DEFAULT_LIMITS, ImageLimits

from .engine_thread import EngineThread
from .model_menu import LoadedModel, ModelMenu


class ServedModels:
    """Models by name; one that is asked for is loaded, and those that answer nobody make room for it.

    Args:
        names: As in `ModelMenu`.
        device: As in `load_for_inference`.
        memory: Bytes that models and caches may take; what is free by default.
        max_rows: Requests that a model answers at the same time.
        max_cache_tokens: Tokens of its KV cache.
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
                self._menu.engines[name] = self._build_engine(self._menu.load(name, keep=busy))
            return self._menu.engines[name]

    def close(self) -> None:
        """Finish what is running."""
        with self._lock:
            for engine in self._menu.engines.values():
                engine.close()

    def _build_engine(self, loaded: LoadedModel) -> EngineThread:
        image_processor = loaded.processor.image_processor
        image_processor.limits, image_processor.urls = self.limits, self.urls
        batch = BatchedGeneration(
            loaded.model,
            loaded.processor,
            max_rows=self.max_rows,
            max_cache_tokens=self.max_cache_tokens,
            cache=loaded.cache,
        )
        return EngineThread(batch, max_open=self.max_open)

    def _build_budget(self, memory: int | None) -> Callable[[torch.device], int]:
        def count(device: torch.device) -> int:
            free = count_free_bytes(device)
            if memory is None:
                return free
            return min(free, memory - sum(loaded.num_bytes for loaded in self._menu.loaded.values()))

        return count


class _Menu(ModelMenu):
    """A menu whose models have an engine, which ends before its model goes."""

    def __init__(self, names: Collection[str], **settings) -> None:
        super().__init__(list(names), **settings)
        self.engines: dict[str, EngineThread] = {}

    def drop(self, label: str) -> None:
        if label in self.engines:
            self.engines.pop(label).close()
        super().drop(label)
