"""Data files of each kind, well formed and not."""

import json

import pytest

from processing_llava.conversation_templates import load_template
from processing_llava.conversations import convert_record, read_conversations, stream_conversations
from processing_llava.prompts import render_prompt

IMAGE = {"type": "image"}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def llava_record(*turns: tuple[str, str], **fields) -> dict:
    return {"id": "7", **fields, "conversations": [{"from": role, "value": value} for role, value in turns]}


def user_content(value: str, *, num_images: int = 1) -> list[dict]:
    images = [f"{number}.jpg" for number in range(num_images)]
    return convert_record(llava_record(("human", value), ("gpt", "A"), image=images), 0)["messages"][0]["content"]


def test_llava_record():
    record = llava_record(("human", "<image>\nWhat?"), ("gpt", "A bus."), image="coco/1.jpg")
    assert convert_record(record, 0) == {
        "id": "7",
        "images": ["coco/1.jpg"],
        "messages": [
            {"role": "user", "content": [IMAGE, text("What?")]},
            {"role": "assistant", "content": [text("A bus.")]},
        ],
    }


@pytest.mark.parametrize("value", ["<image>\nWhat?", "What?\n<image>", "  <image> What? ", "What?<image>"])
def test_a_single_image_goes_to_the_front(value):
    assert user_content(value) == [IMAGE, text("What?")]


def test_text_around_a_moved_image_is_kept():
    assert user_content("In <image> what?") == [IMAGE, text("In  what?")]


def test_an_image_alone():
    assert user_content("<image>\n") == [IMAGE]


@pytest.mark.parametrize("value", ["<image>\n<image>\nWhat?", "<image><image>What?", "\n<image> <image> What?\n"])
def test_several_leading_images(value):
    assert user_content(value, num_images=2) == [IMAGE, IMAGE, text("What?")]


def test_several_images_stay_in_the_text():
    content = user_content("First: <image>\nSecond: <image>\nCompare. ", num_images=2)
    assert content == [text("First: "), IMAGE, text("\nSecond: "), IMAGE, text("\nCompare.")]
    prompt = render_prompt([{"role": "user", "content": content}], load_template("mistral_instruct"))
    assert prompt == "[INST] First: <image>\nSecond: <image>\nCompare. [/INST]"


def test_white_space_of_turns_without_images_is_kept():
    messages = convert_record(llava_record(("human", " Q\n"), ("gpt", " A ")), 0)["messages"]
    assert [message["content"] for message in messages] == [[text(" Q\n")], [text(" A ")]]


def test_image_text_of_an_answer_is_text():
    record = llava_record(("human", "What do I write for a picture?"), ("gpt", "You write <image>."))
    assert convert_record(record, 0)["messages"][1]["content"] == [text("You write <image>.")]


def test_rows_with_messages():
    record = {
        "images": ["1.jpg"],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [IMAGE, text("What?")]},
            {"role": "assistant", "content": "A bus."},
        ],
    }
    row = convert_record(record, 12)
    assert (row["id"], row["images"]) == ("12", ["1.jpg"])
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][1]["content"] == [IMAGE, text("What?")]


def test_a_leading_answer_is_dropped():
    row = convert_record(llava_record(("gpt", "A0"), ("human", "Q"), ("gpt", "A")), 0)
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_ids_are_texts_and_fall_back_to_the_position():
    turns = [{"from": "human", "value": "Q"}]
    assert convert_record({"id": 33, "conversations": turns}, 5)["id"] == "33"
    assert convert_record({"conversations": turns}, 5)["id"] == "5"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (llava_record(("human", "Q"), ("bot", "A")), "got role 'bot' in record '7'"),
        (llava_record(("human", "Q"), ("human", "Q")), "got a turn of the user in record '7' at position 1"),
        (llava_record(("human", "Q"), ("system", "S")), "got a turn of the system in record '7'"),
        (llava_record(("human", "Q"), ("gpt", " \n")), "got an empty answer in record '7' at position 1"),
        (llava_record(("human", "<image>"), ("gpt", "A")), "got 1 <image> and 0 images in record '7'"),
        (llava_record(("human", "Q"), ("gpt", "A"), image="1.jpg"), "got 0 <image> and 1 images in record '7'"),
        (llava_record(), "got no turns in record '7'"),
        (llava_record(("human", None)), "expected a text in 'value'"),
        ({"id": "7", "text": "Q"}, r"got record '7' with keys \['id', 'text'\]"),
    ],
)
def test_records_that_cannot_be_used_are_named(record, message):
    with pytest.raises(ValueError, match=message):
        convert_record(record, 0)


RECORDS = [llava_record(("human", "Q"), ("gpt", "A")), llava_record(("human", "<image>"), ("gpt", "A"), image="1.jpg")]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_lists_are_read(tmp_path, indent):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS, indent=indent), encoding="utf-8")
    assert [row["images"] for row in read_conversations(path)] == [[], ["1.jpg"]]


def test_json_lines_are_read_one_by_one(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(map(json.dumps, RECORDS)) + "\nnot json\n", encoding="utf-8")
    rows = stream_conversations(path)
    assert [next(rows)["images"], next(rows)["images"]] == [[], ["1.jpg"]]
    with pytest.raises(ValueError, match=r"data\.jsonl, line 4: .*expected a JSON list, or one record in each line"):
        next(rows)


def test_image_folder_is_put_in_front(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS), encoding="utf-8")
    assert read_conversations(path, tmp_path / "images")[1]["images"] == [str(tmp_path / "images" / "1.jpg")]
