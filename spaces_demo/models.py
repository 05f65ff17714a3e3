"""DemoMenu: the models of the demo, and what a visitor chooses."""

from collections.abc import Iterator
from contextlib import closing
from copy import copy
from dataclasses import dataclass
from typing import Any

from modeling_llava.inference.attention_map import AnswerAttention, read_attention
from modeling_llava.inference.chat_session import AnswerStatistics, ChatSession
from modeling_llava.serving.model_menu import ModelMenu, sparing_cache
from processing_llava.processing_llava import AnyLlavaProcessor
from processing_llava.templates import change_template

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


class DemoMenu(ModelMenu):
    """Models by the label that the page shows. One answer at a time: Gradio's queue sees to that."""

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
        with sparing_cache(loaded), closing(session.answer(messages, **numbers)) as pieces:
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
        with sparing_cache(loaded), loaded.cache.lock:
            return read_attention(loaded.model, settings.adapt(loaded.processor), messages)
