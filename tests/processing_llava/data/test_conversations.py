"""Data files of each kind, well formed and not."""

import json
from pathlib import Path

import PIL.Image
import pytest

from processing_llava.data.conversations import convert_record
from processing_llava.data.data_bounds import RefusedRecord
from processing_llava.data.json_records import stream_records
from processing_llava.prompts import render_prompt
from processing_llava.templates import load_template

IMAGE = {"type": "image"}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def llava_record(*turns: tuple[str, str], **fields) -> dict:
    return {"id": "7", **fields, "conversations": [{"from": role, "value": value} for role, value in turns]}


def user_content(value: str, *, num_images: int = 1) -> list[dict]:
    images = [f"{number}.jpg" for number in range(num_images)]
    row = convert_record(llava_record(("human", value), ("gpt", "A"), image=images), 0, image_folder="/images")
    return row["messages"][0]["content"]


def test_llava_record():
    record = llava_record(("human", "<image>\nWhat?"), ("gpt", "A bus."), image="coco/1.jpg")
    assert convert_record(record, 0, image_folder="/images") == {
        "id": "7",
        "images": [Path("/images/coco/1.jpg")],
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
    row = convert_record(record, 12, image_folder="/images")
    assert (row["id"], row["images"]) == ("12", [Path("/images/1.jpg")])
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][1]["content"] == [IMAGE, text("What?")]


def test_a_leading_answer_is_dropped():
    row = convert_record(llava_record(("gpt", "A0"), ("human", "Q"), ("gpt", "A")), 0)
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_a_system_text_beside_the_turns_is_the_system_message():
    record = llava_record(("gpt", "A0"), ("human", "Q"), ("gpt", "A"))
    messages = convert_record(record | {"system": "Be brief."}, 0)["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[0]["content"] == [text("Be brief.")]
    assert convert_record(record | {"system": ""}, 0) == convert_record(record | {"system": None}, 0)
    assert convert_record(record | {"system": ""}, 0) == convert_record(record, 0)


def test_ids_are_texts_and_fall_back_to_the_position():
    turns = [{"from": "human", "value": "Q"}]
    assert convert_record({"id": 33, "conversations": turns}, 5)["id"] == "33"
    assert convert_record({"conversations": turns}, 5)["id"] == "5"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (llava_record(("human", "Q"), ("bot", "A")), "got role 'bot' in record '7'"),
        (llava_record(("human", "Q"), ("human", "Q")), "got a turn of the user at position 1 in record '7'"),
        (llava_record(("human", "Q"), ("system", "S")), "got a turn of the system at position 1 in record '7'"),
        (llava_record(("human", "Q"), ("gpt", " \n")), "got an empty answer at position 1 in record '7'"),
        (llava_record(("human", "<image>"), ("gpt", "A")), "got 1 <image> and 0 images in record '7'"),
        (llava_record(("human", "<image>"), ("gpt", "A"), image=["1", "2"]), "got 1 <image> and 2 images in record"),
        (llava_record(), "got no turns in record '7'"),
        (
            llava_record(("system", "S"), ("human", "Q")) | {"system": "T"},
            r"got a system message beside the turns \('T'",
        ),
        (llava_record(("human", "Q")) | {"system": 3}, "expected a text in 'content'"),
        (llava_record(("human", None)), "expected a text in 'value'"),
        ({"id": "7", "text": "Q"}, r"got keys \['id', 'text'\] in record '7'"),
    ],
)
def test_records_that_cannot_be_used_are_named(record, message):
    with pytest.raises(ValueError, match=message):
        convert_record(record, 0)


ANSWER = {"from": "gpt", "value": "A"}
QUESTION = {"from": "human", "value": "Q"}
OWN_IMAGE = [{"type": "image", "image": b"1"}, {"type": "text", "text": "Q"}]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("a text", "not a record"),
        (None, "not a record"),
        ([QUESTION, ANSWER], "not a record"),
        ({"id": "7"}, "no conversation"),
        ({"conversations": None, "messages": None}, "no conversation"),
        ({"conversations": "Q: A"}, "malformed turn"),
        ({"conversations": {"from": "human"}}, "malformed turn"),
        ({"conversations": ["Q", "A"]}, "malformed turn"),
        ({"conversations": [{"from": ["human"], "value": "Q"}, ANSWER]}, "malformed turn"),
        ({"conversations": [{"from": "human", "value": 7}, ANSWER]}, "malformed turn"),
        ({"conversations": [{"from": "bing", "value": "Q"}, ANSWER]}, "unknown role"),
        ({"conversations": [QUESTION, ANSWER, ANSWER]}, "wrong order of turns"),
        ({"conversations": [QUESTION, {"from": "gpt", "value": ""}]}, "empty answer"),
        ({"conversations": []}, "no turns"),
        ({"conversations": [ANSWER]}, "no turns"),
        ({"conversations": [{"from": "human", "value": "half \ud83d"}, ANSWER]}, "text that is not Unicode"),
        ({"conversations": [QUESTION, ANSWER], "image": 7}, "malformed image"),
        ({"prompt": "Q", "completion": "A"}, "no conversation"),
        ({"prompt": [QUESTION]}, "no conversation"),
        ({"messages": [QUESTION, ANSWER], "completion": [ANSWER]}, "two keys for one thing"),
        ({"conversations": [{"from": "human", "value": "<image>"}, ANSWER], "image": 7}, "malformed image"),
        (
            {"conversations": [{"from": "human", "value": "<image>"}, ANSWER], "image": [None]},
            "images and placeholders differ",
        ),
        (
            {"conversations": [{"from": "human", "value": "<image>"}, ANSWER], "image": {"bytes": b""}},
            "images and placeholders differ",
        ),
        ({"conversations": [QUESTION, ANSWER], "video": "clip.mp4"}, "video or audio"),
        ({"conversations": [QUESTION, ANSWER], "audios": ["a.wav"]}, "video or audio"),
        ({"conversations": [QUESTION, ANSWER], "messages": [QUESTION, ANSWER]}, "two keys for one thing"),
        ({"conversations": [QUESTION, ANSWER], "image": "1.jpg", "images": ["2.jpg"]}, "two keys for one thing"),
        ({"messages": [{"role": "user", "content": OWN_IMAGE}, ANSWER], "images": [b"2"]}, "two keys for one thing"),
        ({"messages": [QUESTION, ANSWER | {"tool_calls": [{"id": "1"}]}]}, "tool calls"),
        ({"messages": [QUESTION, ANSWER | {"weight": 0}]}, "weight of an answer"),
        ({"messages": [{"role": "user", "content": ["Q"]}]}, "malformed content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "malformed content"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "malformed content"),
    ],
)
def test_every_kind_of_malformed_record_has_its_reason(record, reason):
    with pytest.raises(RefusedRecord) as caught:
        convert_record(record, 31)
    assert caught.value.reason == reason
    assert caught.value.record_id == (record.get("id") or "31" if isinstance(record, dict) else "31")


def test_rows_of_columns_keep_only_what_an_item_needs():
    items = [{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "What?", "index": None}]
    record = {"image": None, "images": [b"GIF"], "conversations": None}
    row = convert_record(record | {"messages": [{"role": "user", "content": items}]}, 0)
    assert (row["images"], row["messages"][0]["content"]) == ([b"GIF"], [IMAGE, text("What?")])


def test_keys_that_hold_nothing_are_as_if_missing():
    record = {"id": "7", "conversations": [QUESTION | {"weight": 0, "tool_calls": []}, ANSWER | {"weight": 1}]}
    others = {"messages": [], "images": [], "image": None, "video": None, "audios": []}
    assert convert_record(record | others, 0) == convert_record(record, 0)
    picture = {"id": "7", "conversations": [{"from": "human", "value": "<image>"}, ANSWER], "image": b"GIF"}
    assert convert_record(picture | {"images": []}, 0)["images"] == [b"GIF"]


def test_turns_as_columns_and_turns_with_the_keys_of_the_other_format():
    columns = {"from": ["human", "gpt"], "value": ["Q", "A"]}
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    expected = [{"role": "user", "content": [text("Q")]}, {"role": "assistant", "content": [text("A")]}]
    assert convert_record({"conversations": columns}, 0)["messages"] == expected
    assert convert_record({"conversations": turns}, 0)["messages"] == expected


def test_images_inside_messages():
    picture = PIL.Image.new("RGB", (4, 3))
    content = [{"type": "image", "path": "1.jpg"}, {"type": "image", "image": picture}, text("Same?")]
    row = convert_record({"messages": [{"role": "user", "content": content}]}, 0, image_folder="/images")
    assert row["images"] == [Path("/images/1.jpg"), picture]
    assert row["messages"][0]["content"] == [IMAGE, IMAGE, text("Same?")]


def test_only_paths_are_put_into_the_image_folder():
    images = [
        {"bytes": b"GIF", "path": "1.gif"},
        {"bytes": None, "path": "2.gif"},
        "data:image/png;base64,AA",
        Path("3.gif"),
    ]
    record = llava_record(("human", "<image>" * 4), ("gpt", "A"), images=images)
    row = convert_record(record, 0, image_folder="/folder")
    assert row["images"] == [b"GIF", Path("/folder/2.gif"), "data:image/png;base64,AA", Path("3.gif")]


@pytest.mark.parametrize(
    "image", ["/etc/hostname", "../1.jpg", "a/../../1.jpg", {"bytes": None, "path": "/1.jpg"}, "\0"]
)
def test_paths_cannot_leave_the_image_folder(image, tmp_path):
    record = llava_record(("human", "<image>"), ("gpt", "A"), image=image)
    with pytest.raises(RefusedRecord) as caught:
        convert_record(record, 7, image_folder=tmp_path / "images")
    assert caught.value.reason == "image outside its folder"


@pytest.mark.parametrize("image", ["1.jpg", "/etc/hostname", {"bytes": None, "path": "1.jpg"}])
def test_paths_without_an_image_folder_are_refused(image):
    with pytest.raises(RefusedRecord, match="set image_folder"):
        convert_record(llava_record(("human", "<image>"), ("gpt", "A"), image=image), 7)


RECORDS = [llava_record(("human", "Q"), ("gpt", "A")), llava_record(("human", "<image>"), ("gpt", "A"), image="1.jpg")]


def test_image_folder_is_put_in_front(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS), encoding="utf-8")
    _, row = (convert_record(item, 0, image_folder=tmp_path / "images") for item in stream_records(path))
    assert row["images"] == [tmp_path / "images" / "1.jpg"]


def test_reading_stops_at_a_line_that_is_not_json(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(map(json.dumps, RECORDS)) + "\nnot json\n", encoding="utf-8")
    rows = (convert_record(item, 0, image_folder=tmp_path) for item in stream_records(path))
    assert [next(rows)["images"], next(rows)["images"]] == [[], [tmp_path / "1.jpg"]]
    with pytest.raises(ValueError, match="'data.jsonl, line 4'; expected a JSON list, or one record in each line"):
        next(rows)
