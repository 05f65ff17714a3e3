"""Handlers: what happens when a visitor does something. app.py says which component calls which.

A question passes through three of them: one that puts it into the conversation (ask, retry, edit), `answer`, which
streams, and `finish`, which runs whatever happened and gives a question without an answer back to its text box.
"""

import html
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import gradio as gr

from modeling_llava.inference.attention_map import AnswerAttention
from modeling_llava.inference.chat_session import AnswerStatistics
from modeling_llava.serving.guard import log_error
from modeling_llava.serving.model_menu import LoadedModel, MemoryShort

from .attention_view import Looked
from .conversation import Answer, Conversation, Turn, open_picture
from .feedback import FeedbackFile
from .models import DemoMenu, Settings
from .safety import (
    MAX_CHARACTERS,
    MAX_CONVERSATION_CHARACTERS,
    MAX_CONVERSATION_PICTURES,
    MAX_PICTURES,
    MAX_SYSTEM_CHARACTERS,
)

SECONDS_PER_UPDATE = 0.05
"""Time between two updates of the page, while an answer is written."""


class Handlers:
    """One method for each event of the page.

    Args:
        menu: The models.
        examples: Questions about example pictures: "image" (a path) and "question".
        feedback: Where opinions go, if anywhere.
        on_gpu: Wraps what needs the models (ZeroGPU lends its GPU to such functions only).
    """

    def __init__(
        self,
        menu: DemoMenu,
        *,
        examples: list[dict[str, str]],
        feedback: FeedbackFile | None,
        on_gpu: Callable[[Callable], Callable],
    ) -> None:
        self.menu = menu
        self.examples = examples
        self.feedback = feedback
        self.stream = on_gpu(self._stream)
        self.look_at = on_gpu(self._look_at)

    def ask(self, message: dict[str, Any], conversation: Conversation) -> tuple:
        """Message of the text box -> conversation, both chats, text box."""
        question, pictures = message["text"].strip(), message["files"]
        with show_errors():
            turn = _check_turn(question, pictures, after=conversation.turns)
        return self._wait(conversation, [*conversation.turns, turn])

    def ask_example(self, conversation: Conversation, event: gr.SelectData) -> tuple:
        example = self.examples[event.index]
        with show_errors():
            turn = _check_turn(example["question"], [example["image"]], after=conversation.turns)
        return self._wait(conversation, [*conversation.turns, turn])

    def retry(self, conversation: Conversation) -> tuple:
        with show_errors():
            last = _find_turn(conversation, -1)
        return self._wait(conversation, [*conversation.turns[:-1], Turn(last.question, last.pictures)])

    def edit(self, conversation: Conversation, event: gr.EditData) -> tuple:
        """The question is asked anew with its pictures; what came after it is forgotten."""
        number = event.index // 2
        with show_errors():
            pictures = _find_turn(conversation, number).pictures
            turn = _check_turn(event.value.strip(), pictures, after=conversation.turns[:number])
            if not conversation.turns[-1].answers:
                raise ValueError("Wait for the answer or stop it, then edit.")
        return self._wait(conversation, [*conversation.turns[:number], turn])

    def undo(self, conversation: Conversation) -> tuple:
        with show_errors():
            _find_turn(conversation, -1)
        return self._give_back(conversation)

    def answer(
        self,
        conversation: Conversation,
        left: str,
        right: str,
        template: str,
        tile_mode: str,
        system: str,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        seed: int | None,
    ) -> Iterator[tuple]:
        """-> conversation, both chats; one model after the other, so that neither slows the other down."""
        if not conversation.turns or conversation.turns[-1].answers:
            # The question was taken back while it waited.
            yield gr.skip(), gr.skip(), gr.skip()
            return
        *before, turn = conversation.turns
        answers: list[Answer] = []
        with show_errors():
            if len(system) > MAX_SYSTEM_CHARACTERS:
                raise ValueError(
                    f"got a system text of {len(system)} characters; expected at most {MAX_SYSTEM_CHARACTERS}; "
                    "shorten it in the settings"
                )
            # A visitor can empty the field of the seed.
            chosen = Settings(template, tile_mode, system, temperature, top_p, max_new_tokens, seed or 0)
            for column, label in enumerate([left, right] if right else [left]):
                messages = conversation.list_messages(column)
                answers.append(Answer(label, chosen))
                shown_at = 0.0
                with closing(self.stream(label, messages, chosen, conversation.scope)) as stream:
                    for text, statistics in stream:
                        answers[-1] = Answer(label, chosen, text, statistics)
                        if statistics is None and time.monotonic() - shown_at < SECONDS_PER_UPDATE:
                            continue
                        shown_at = time.monotonic()
                        conversation = conversation.go_on([*before, replace(turn, answers=list(answers))])
                        # Until its own answer begins, the right chat would show the left one's.
                        yield conversation, conversation.show(0), conversation.show(1) if column else gr.skip()

    def finish(self, conversation: Conversation) -> tuple:
        """-> conversation, both chats, text box."""
        if conversation.turns and not conversation.turns[-1].answers:
            return self._give_back(conversation)
        if conversation.turns:
            conversation = conversation.mark_stopped()
        return self._show(conversation, self._open_textbox())

    def forget(self) -> tuple:
        """-> conversation, both chats, text box; and what was looked at, its words, layers and view."""
        hidden = gr.update(visible=False)
        return *self._show(Conversation(), self._open_textbox(value=None)), None, hidden, hidden, ""

    def forget_again(self, conversation: Conversation) -> tuple:
        """As `forget`, of an answer that came back; a question that was typed or asked since stays."""
        if conversation.turns and conversation.turns[-1].answers:
            return self.forget()
        return (gr.skip(),) * 8

    def take_picture(self, picture: str | None, message: dict[str, Any]) -> tuple:
        """Camera, text box -> camera, text box."""
        if picture is None:
            return gr.skip(), gr.skip()
        return None, {"text": message["text"], "files": [*message["files"], picture]}

    def choose_models(
        self,
        left: str,
        right: str,
        current: tuple[str, str],
        # Gradio looks for this default, and shows the progress bars of what runs below (Gradio 6.31, helpers.py).
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008
    ) -> tuple:
        """-> both menus, the models that are chosen now, what they are, both chats."""
        descriptions = []
        try:
            for label in filter(None, (left, right)):
                if label not in self.menu.loaded:
                    progress(0, desc=f"Loading {label}")
                loaded = self._load(label, keep=[left])
                descriptions.append(f"<b>{html.escape(label)}</b> {loaded.describe()}")
        except ValueError as error:
            gr.Warning(html.escape(f"Not loaded: {error}"))
            return *current, current, gr.skip(), gr.skip(), gr.skip()
        chats = (
            gr.update(label=left, show_label=bool(right)),
            gr.update(label=right, show_label=True, visible=bool(right)),
        )
        return left, right, (left, right), "<br>".join(descriptions), *chats

    def look(self, conversation: Conversation, side: str) -> tuple:
        """-> attention of the last answer, its words with the one that looks most chosen, the layers."""
        column = ("left", "right").index(side)
        with show_errors():
            answer = conversation.turns[-1].choose_answer(column) if conversation.turns else None
            if answer is None:
                raise ValueError("got no answer to look at; ask a question about a picture first")
            messages = conversation.list_messages(column, with_last_answer=True)
            attention = self.look_at(answer.model, messages, answer.settings)
            if not attention.weights:
                raise ValueError("got a conversation without pictures; ask a question about a picture first")
            loaded = self._load(answer.model)
            pictures = [path for turn in conversation.turns for path in turn.pictures]
            looked = Looked(attention, loaded.model.config, answer.settings.adapt(loaded.processor), pictures)
        choices = [(word, place) for place, word in enumerate(attention.words)]
        words = gr.update(choices=choices, value=looked.find_word(), visible=True)
        return looked, words, gr.update(visible=True)

    def show_word(self, looked: Looked | None, word: int, layers: str) -> str:
        """HTML with every picture that was looked at as one word saw it."""
        if looked is None:
            return ""
        with show_errors():
            return looked.draw(word=word, layers=layers)

    def rate(self, conversation: Conversation, column: int, event: gr.LikeData) -> None:
        opinion = {True: "Like", False: "Dislike"}.get(event.liked, event.liked)
        if opinion == "":
            # It was taken back on the page; the file only grows.
            return
        with show_errors():
            self.feedback.write(conversation, turn=event.index // 2, column=column, opinion=opinion)
        gr.Info("Thank you. Question, answer and opinion were stored for the operator of this page.")

    # ZeroGPU runs the next two in a process of its own. It prints errors that are not Gradio's, with what they quote,
    # and tells the page no more than their type.
    def _stream(
        self, label: str, messages: list[dict[str, Any]], settings: Settings, scope: bytes
    ) -> Iterator[tuple[str, AnswerStatistics | None]]:
        with show_errors():
            self._load(label)
            yield from self.menu.answer(label, messages, settings, scope=scope)

    def _look_at(self, label: str, messages: list[dict[str, Any]], settings: Settings) -> AnswerAttention:
        with show_errors():
            self._load(label)
            return self.menu.look(label, messages, settings)

    def _load(self, label: str, *, keep: Collection[str] = ()) -> LoadedModel:
        """As the menu, but what went wrong is told without the folders of the machine."""
        try:
            return self.menu.load(label, keep=keep)
        except MemoryShort:
            raise
        except Exception as error:
            log_error(error)
            raise ValueError(f"{label} cannot be loaded ({type(error).__name__}); choose another model") from None

    def _wait(self, conversation: Conversation, turns: list[Turn]) -> tuple:
        textbox = gr.update(value=None, interactive=False, submit_btn=False, stop_btn=True)
        # Gradio 6.31 lets questions be edited until the first piece of the answer comes; such an edit would be lost.
        return self._show(conversation.go_on(turns), textbox, editable="nothing")

    def _give_back(self, conversation: Conversation) -> tuple:
        *before, last = conversation.turns
        textbox = self._open_textbox(value={"text": last.question, "files": last.pictures})
        return self._show(conversation.go_on(before), textbox)

    def _show(self, conversation: Conversation, textbox: dict[str, Any], *, editable: str = "user") -> tuple:
        """-> conversation, both chats, text box."""
        # The page of Gradio 6.31 ignores None, and takes any other word for it.
        left = gr.update(value=conversation.show(0), editable=editable)
        return conversation, left, conversation.show(1), textbox

    def _open_textbox(self, **changes: Any) -> dict[str, Any]:
        return gr.update(interactive=True, submit_btn=True, stop_btn=False, **changes)


def _find_turn(conversation: Conversation, number: int) -> Turn:
    try:
        return conversation.turns[number]
    except IndexError:
        raise ValueError("This page has forgotten the conversation, as it does after an hour; begin anew.") from None


def _check_turn(question: str, pictures: list[str], *, after: list[Turn]) -> Turn:
    """A question that may be put after these turns: the page has limits of its own, and programs do not know them.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if not question:
        raise ValueError("Type a question, then send it.")
    if len(question) > MAX_CHARACTERS or len(pictures) > MAX_PICTURES:
        raise ValueError(
            f"got {len(question)} characters and {len(pictures)} pictures; expected at most {MAX_CHARACTERS} "
            f"and {MAX_PICTURES}"
        )
    num_characters = len(question) + sum(
        len(turn.question) + sum(len(answer.text) for answer in turn.answers) for turn in after
    )
    num_pictures = len(pictures) + sum(len(turn.pictures) for turn in after)
    if num_characters > MAX_CONVERSATION_CHARACTERS or num_pictures > MAX_CONVERSATION_PICTURES:
        raise ValueError(
            f"got a conversation of {num_characters} characters and {num_pictures} pictures; expected at most "
            f"{MAX_CONVERSATION_CHARACTERS} and {MAX_CONVERSATION_PICTURES}; start a new conversation"
        )
    for path in pictures:
        open_picture(path)
    return Turn(question, pictures)


@contextmanager
def show_errors() -> Iterator[None]:
    """Errors as one line on the page. The log says where one came from, and nothing of what was said."""
    try:
        yield
    except gr.Error:
        raise
    except ValueError as error:
        message = " ".join(str(error).split())
        raise gr.Error(html.escape(message), title="That did not work", print_exception=False) from None
    except Exception as error:
        log_error(error)
        raise gr.Error(
            f"The model failed ({type(error).__name__}). Try again, or with a smaller picture.",
            title="That did not work",
            print_exception=False,
        ) from None
