"""What happens when a visitor does something, without a page: the embedded model, and one that cannot be loaded."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest

from modeling_llava.inference.loading import EMBEDDED_MODEL
from spaces_demo.conversation import Answer, Conversation, Turn
from spaces_demo.handlers import Handlers
from spaces_demo.models import AS_TRAINED, DemoMenu, Settings

pytestmark = pytest.mark.core

PENGUIN = str(Path(__file__).parents[2] / "spaces_demo" / "examples" / "twemoji-penguin.png")


def build_handlers(*names: str) -> Handlers:
    return Handlers(DemoMenu(list(names)), examples=[], feedback=None, on_gpu=lambda function: function)


def stream(handlers: Handlers, conversation: Conversation, *, right: str = "", **changes) -> Iterator[tuple]:
    settings = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8, "seed": 0} | changes
    return handlers.answer(conversation, "embedded", right, AS_TRAINED, AS_TRAINED, "", *settings.values())


def answer(handlers: Handlers, conversation: Conversation, **changes) -> Conversation:
    *_, (conversation, _, _) = stream(handlers, conversation, **changes)
    return conversation


def test_no_question_can_be_edited_while_one_waits_for_its_answer():
    handlers = build_handlers()
    waiting, chat, _, _ = handlers.ask({"text": "What?", "files": []}, Conversation())
    assert chat["editable"] == "nothing"
    # An edit that was begun before that is refused, as it would be lost.
    with pytest.raises(gr.Error, match="then edit"):
        handlers.edit(waiting, SimpleNamespace(index=0, value="Who?"))
    for after in (answer(handlers, waiting), waiting):
        _, chat, _, _ = handlers.finish(after)
        assert chat["editable"] == "user"
    assert handlers.forget()[1]["editable"] == "user"


def test_a_conversation_that_was_forgotten_is_said_to_be():
    handlers = build_handlers()
    forgotten = Conversation()
    for call in (
        lambda: handlers.retry(forgotten),
        lambda: handlers.undo(forgotten),
        lambda: handlers.edit(forgotten, SimpleNamespace(index=2, value="What?")),
    ):
        with pytest.raises(gr.Error, match="forgotten the conversation"):
            call()


def test_a_column_never_shows_the_answer_that_the_other_model_just_gave():
    handlers = build_handlers()
    asked = Conversation().go_on([Turn("What is this?", [PENGUIN])])
    shown = [
        (len(conversation.turns[0].answers), right)
        for conversation, _, right in stream(handlers, asked, right="embedded")
    ]
    assert {right == gr.skip() for num_answers, right in shown if num_answers == 1} == {True}
    assert {right == gr.skip() for num_answers, right in shown if num_answers == 2} == {False}
    assert "a penguin" in shown[-1][1][1]["content"]


def test_an_empty_seed_is_zero():
    handlers = build_handlers()
    asked = Conversation().go_on([Turn("What is this?", [PENGUIN])])
    texts = [answer(handlers, asked, temperature=2.0, seed=seed).turns[0].answers[0].text for seed in (None, 0)]
    assert texts[0] == texts[1]


def test_what_was_looked_at_is_drawn_whatever_becomes_of_the_conversation():
    handlers = build_handlers()
    said = Conversation().go_on([Turn("What is this?", [PENGUIN], [Answer("embedded", Settings(), "a penguin")])])
    looked, words, _ = handlers.look(said, "left")
    drawn = handlers.show_word(looked, words["value"], "all")
    assert 'alt="Where the model looked in picture 1 for the word penguin"' in drawn


@pytest.fixture
def broken(tmp_path) -> str:
    """The embedded model with weights that were cut off."""
    folder = tmp_path / "secret" / "broken"
    shutil.copytree(EMBEDDED_MODEL, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return str(folder)


def test_a_model_that_cannot_be_loaded_is_told_without_its_folder(broken):
    handlers = build_handlers(EMBEDDED_MODEL, broken)
    current = ("embedded", "")
    with pytest.warns(UserWarning, match=r"Not loaded: broken cannot be loaded \(ValueError\)") as warned:
        left, right, *_ = handlers.choose_models("broken", "", current)
    assert (left, right) == current
    assert "secret" not in str(warned[0].message)
    with pytest.raises(gr.Error, match="broken cannot be loaded") as error:
        next(handlers.stream("broken", [{"role": "user", "content": "What?"}], Settings(), b""))
    assert "secret" not in str(error.value)
