"""What was said, as models read it, as the page shows it, and as the operator's file keeps it."""

import json

import pytest
from PIL import Image

from modeling_llava.inference.chat_session import AnswerStatistics
from processing_llava.image_loading import load_image
from spaces_demo.conversation import Answer, Conversation, Turn
from spaces_demo.feedback import FeedbackFile
from spaces_demo.models import Settings

STATISTICS = AnswerStatistics(75, 64, 70, 3, 0.25, 41.6)


@pytest.fixture
def talk(tmp_path) -> Conversation:
    """A turn with one model and a picture, then one with two models."""
    picture = tmp_path / "red.png"
    Image.new("RGB", (4, 4), "red").save(picture)
    answers = [Answer(model, Settings(), text, STATISTICS) for model, text in (("a", "red"), ("b", "blue"))]
    return Conversation([Turn("What?", [str(picture)], answers[:1]), Turn("Sure?", [], answers)])


def texts(messages: list[dict]) -> list[str]:
    return [item["text"] for message in messages for item in message["content"] if item["type"] == "text"]


def test_a_model_reads_its_own_answers_and_where_it_was_not_asked_the_other_ones(talk):
    talk.turns.append(Turn("And now?"))
    assert texts(talk.list_messages(0)) == ["What?", "red", "Sure?", "red", "And now?"]
    assert texts(talk.list_messages(1)) == ["What?", "red", "Sure?", "blue", "And now?"]
    picture = talk.list_messages(1)[0]["content"][0]["image"]
    assert load_image(picture).getpixel((0, 0)) == (255, 0, 0)


def test_the_last_answer_is_left_out_unless_it_is_asked_for(talk):
    assert texts(talk.list_messages(1)) == ["What?", "red", "Sure?"]
    assert texts(talk.list_messages(1, with_last_answer=True)) == ["What?", "red", "Sure?", "blue"]


def test_a_picture_that_was_deleted_is_said_to_be(talk, tmp_path):
    (tmp_path / "red.png").unlink()
    with pytest.raises(ValueError, match="deleted an hour after"):
        talk.list_messages(0)


def test_the_page_shows_two_messages_for_each_turn_with_who_answered_and_what_it_took(talk):
    shown = talk.show(1)
    assert [message["role"] for message in shown] == ["user", "assistant"] * 2
    assert shown[0]["content"][0]["alt_text"] == "Picture of question 1"
    text, caption = shown[3]["content"]
    assert text == "blue"
    plain = caption.replace("\\", "")
    assert plain == (
        "<small>b · first token after 0.25 s · 42 tokens/s · 64 image tokens · 70 of 75 tokens reused</small>"
    )


def test_an_answer_without_statistics_was_stopped():
    conversation = Conversation([Turn("What?", [], [Answer("a", Settings(), "re")])])
    assert "stopped" not in conversation.show(0)[1]["content"][1]
    assert "a · stopped" in conversation.mark_stopped().show(0)[1]["content"][1]


def test_an_answer_without_words_says_so():
    shown = Conversation([Turn("What?", [], [Answer("a", Settings(), "", STATISTICS)])]).show(0)
    assert shown[1]["content"][0] == "(no words)"


def test_the_scope_is_made_with_the_first_question_and_stays():
    """Every visitor begins with a copy of one empty conversation."""
    empty = Conversation()
    first, second = empty.go_on([Turn("What?")]), empty.go_on([Turn("What?")])
    assert len({first.scope, second.scope, b""}) == 3
    assert first.go_on([]).go_on([Turn("And?")]).scope == first.scope


def test_a_question_that_waits_has_no_answer_on_the_page():
    assert len(Conversation([Turn("What?")]).show(0)) == 1


def test_feedback_keeps_what_was_said_of_the_answer_that_was_rated(talk, tmp_path):
    path = tmp_path / "feedback.jsonl"
    feedback = FeedbackFile(str(path))
    feedback.write(talk, turn=1, column=1, opinion="Wrong")
    for _ in range(2):
        feedback.write(talk, turn=0, column=0, opinion="Like")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [(record["model"], record["opinion"], record["question"], record["answer"]) for record in records]
    assert kept == [("b", "Wrong", "Sure?", "blue"), ("a", "Like", "What?", "red")]


def test_feedback_refuses_what_no_page_sends(talk, tmp_path, monkeypatch):
    feedback = FeedbackFile(str(tmp_path / "feedback.jsonl"))
    for turn, opinion in ((0, "x" * 1000), (2, "Like"), (-1, "Like")):
        with pytest.raises(ValueError, match="expected"):
            feedback.write(talk, turn=turn, column=0, opinion=opinion)
    with pytest.raises(ValueError, match="has no answer"):
        feedback.write(Conversation([Turn("What?")]), turn=0, column=0, opinion="Like")
    monkeypatch.setattr("spaces_demo.feedback.MAX_BYTES", 1)
    feedback.write(talk, turn=0, column=0, opinion="Like")
    with pytest.raises(ValueError, match="full"):
        feedback.write(talk, turn=0, column=0, opinion="Like")
    with pytest.raises(OSError):
        FeedbackFile(str(tmp_path / "missing" / "feedback.jsonl"))
