"""Conversation: what a visitor and up to two models said, as the models read it and as Gradio shows it.

It lives on the server and is the only truth: a page tells which message it means, never what was said before.
"""

import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from modeling_llava.inference.chat_session import AnswerStatistics
from processing_llava.image_loading import load_image

from .models import Settings
from .safety import show_as_text

NO_WORDS = "(no words)"


@dataclass
class Answer:
    model: str
    """Its label in the menu."""
    settings: Settings
    text: str = ""
    statistics: AnswerStatistics | None = None
    is_stopped: bool = False
    opinion: str = ""
    """The last one that was stored."""

    @property
    def caption(self) -> str:
        """Who answered, and what it took."""
        if self.statistics is None:
            return f"{self.model} · stopped" if self.is_stopped else self.model
        took = self.statistics
        parts = [
            self.model,
            f"first token after {took.seconds_to_first_token:.2f} s",
            f"{took.tokens_per_second:.0f} tokens/s",
            f"{took.num_image_tokens} image tokens",
            f"{took.num_reused_tokens} of {took.num_prompt_tokens} tokens reused",
        ]
        return " · ".join(parts)


@dataclass
class Turn:
    question: str
    pictures: list[str] = field(default_factory=list)
    """Paths of files that `safety.clean_picture` wrote, or of examples."""
    answers: list[Answer] = field(default_factory=list)
    """One for each model asked: left, right."""

    def choose_answer(self, column: int) -> Answer | None:
        """What a column shows: a model that was not asked goes on from what the other one said."""
        return self.answers[min(column, len(self.answers) - 1)] if self.answers else None


@dataclass
class Conversation:
    turns: list[Turn] = field(default_factory=list)
    scope: bytes = b""
    """Scope of a `ChatSession`, so that nobody learns from what is reused what others asked. It is made with the first
    question: every visitor begins with a copy of the same empty conversation."""

    def go_on(self, turns: list[Turn]) -> "Conversation":
        """The conversation of the same visitor, with these turns."""
        return Conversation(turns, self.scope or secrets.token_bytes(16))

    def list_messages(self, column: int, *, with_last_answer: bool = False) -> list[dict[str, Any]]:
        """What the model of a column reads: every turn before the last one, and the last question.

        Raises:
            ValueError: if a picture is refused or was deleted.
        """
        messages = []
        for turn in self.turns:
            content = [{"type": "image", "image": find_picture(path)} for path in turn.pictures]
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.question}]})
            answer = turn.choose_answer(column)
            if answer is not None and (turn is not self.turns[-1] or with_last_answer):
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer.text}]})
        return messages

    def mark_stopped(self) -> "Conversation":
        """The same, with the last answers ended where they are."""
        *before, last = self.turns
        answers = [replace(answer, is_stopped=answer.statistics is None) for answer in last.answers]
        return self.go_on([*before, replace(last, answers=answers)])

    def show(self, column: int) -> list[dict[str, Any]]:
        """Messages for `gr.Chatbot`: two for each turn, of which the last may be missing."""
        messages = []
        for number, turn in enumerate(self.turns, start=1):
            pictures = [{"path": path, "alt_text": f"Picture of question {number}"} for path in turn.pictures]
            messages.append({"role": "user", "content": [*pictures, show_as_text(turn.question)]})
            answer = turn.choose_answer(column)
            if answer is not None and (answer.text or answer.statistics or answer.is_stopped):
                caption = f"<small>{show_as_text(answer.caption)}</small>"
                messages.append({"role": "assistant", "content": [answer.text or NO_WORDS, caption]})
        return messages


def open_picture(path: str) -> Image.Image:
    """A picture of a turn.

    Raises:
        ValueError: if it is refused or was deleted.
    """
    return load_image(find_picture(path))


def find_picture(path: str) -> Path:
    """The file of a picture of a turn, which the processor opens when it is its turn.

    Raises:
        ValueError: if it was deleted.
    """
    if not Path(path).is_file():
        raise ValueError("got a picture that was deleted an hour after its upload; start a new conversation")
    return Path(path)
