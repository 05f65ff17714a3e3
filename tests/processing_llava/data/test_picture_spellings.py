"""Every spelling of "no picture" means the same at every door, and every form of a picture is read at all of them."""

import base64
import io
import json
import math

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from processing_llava.data.collator import LlavaDataCollator
from processing_llava.data.conversations import convert_record
from processing_llava.data.data_check import RecordCheck
from processing_llava.data.data_sources import DataSource
from processing_llava.data.row_datasets import load_rows
from processing_llava.messages import find_picture, is_missing
from tests.tiny import tiny_processor

PICTURE = Image.new("RGB", (40, 30), "red")
ENCODED = io.BytesIO()
PICTURE.save(ENCODED, "PNG")
ENCODED = ENCODED.getvalue()
BASE64 = base64.b64encode(ENCODED).decode()
URI = f"data:image/png;base64,{BASE64}"
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
TEXTS = [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]
PLACE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}, ANSWER]

NOTHING = {
    "None": None,
    "empty text": "",
    "blanks": " \n",
    "empty list": [],
    "list of None": [None],
    "tuple": (None, ""),
    "list of empty texts": ["", ""],
    "lists in lists": [[], [None]],
    "NaN": math.nan,
    "NaN of numpy": np.float32("nan"),
    "list of NaN": [math.nan],
    "no bytes": b"",
    "dict of datasets": {"bytes": None, "path": None},
    "dict of nothing": {"bytes": b"", "path": ""},
    "list of dicts": [{"bytes": None, "path": None}],
    "empty dict": {},
    "array of pandas": np.array([None, ""], dtype=object),
}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.mark.parametrize("nothing", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("key", ["image", "images"])
def test_nothing_is_no_picture_of_a_record(processor, key, nothing):
    assert RecordCheck(processor)({"messages": TEXTS, key: nothing}, 0)[1] == []
    assert convert_record({"messages": TEXTS, "image": nothing, "images": nothing}, 0)["images"] == []
    other = {"image": "images", "images": "image"}[key]
    assert convert_record({"messages": PLACE, key: nothing, other: [ENCODED]}, 0)["images"] == [ENCODED]
    batch = LlavaDataCollator(processor)([{"messages": TEXTS, key: nothing}, {"messages": PLACE, "images": [PICTURE]}])
    assert len(batch["pixel_values"]) == 1


@pytest.mark.parametrize("nothing", NOTHING.values(), ids=NOTHING)
def test_nothing_is_no_picture_of_an_item(processor, nothing):
    item = {"type": "image", "image": nothing}
    if isinstance(nothing, np.ndarray):
        return
    messages = [{"role": "user", "content": [item, {"type": "text", "text": "q"}]}, ANSWER]
    assert convert_record({"messages": messages, "images": [ENCODED]}, 0)["images"] == [ENCODED]
    assert len(LlavaDataCollator(processor)([{"messages": messages, "image": PICTURE}])["pixel_values"]) == 1
    with pytest.raises(ValueError, match="image item without a picture"):
        processor.apply_chat_template(messages[:1], tokenize=True)


@pytest.mark.parametrize(
    "nothing", [value for value in NOTHING.values() if not isinstance(value, np.ndarray)], ids=str
)
def test_nothing_is_no_picture_for_the_processor(processor, nothing):
    texts = ["<image> hi", "hi"]
    expected = processor(images=[[PICTURE], []], text=texts)["input_ids"]
    for images in ([[PICTURE], nothing], [PICTURE, nothing], [[PICTURE, nothing], [nothing]]):
        assert processor(images=images, text=texts)["input_ids"] == expected
    expected = processor(images=[[], [PICTURE]], text=texts[::-1])["input_ids"]
    for images in ([nothing, [PICTURE]], [nothing, PICTURE]):
        assert processor(images=images, text=texts[::-1])["input_ids"] == expected
    for images in (nothing, [nothing], [nothing, nothing]):
        assert "pixel_values" not in processor(images=images, text=["hi", "hi"])
    assert len(processor(images=[PICTURE, nothing], text="<image> hi")["pixel_values"]) == 1
    with pytest.raises(ValueError, match="neither text nor images"):
        processor(images=nothing)


@pytest.mark.parametrize(
    "value", [0, 1, False, "a", b"a", ["a", None], PICTURE, np.zeros(2), torch.zeros(2), {"a": 1}]
)
def test_something_is_not_nothing(value):
    assert not is_missing(value)


def test_nothing_in_files(tmp_path):
    rows = [{"messages": TEXTS, "image": value} for value in (None, "", math.nan)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    features = datasets.Features(
        {"conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
         "image": datasets.Image(), "id": datasets.Value("float64")}
    )  # fmt: skip
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    saved = datasets.Dataset.from_list([{"conversations": turns, "image": None, "id": math.nan}], features=features)
    saved.to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        loaded, _ = load_rows([DataSource(path=str(tmp_path / name))])
        assert all(row["images"] == [] for row in loaded) and loaded[0]["id"] == "0"


FORMS = {
    "image_url": {"type": "image_url", "image_url": {"url": URI}},
    "base64": {"type": "image", "base64": BASE64},
    "base64 as a URI": {"type": "image", "base64": URI},
    "url": {"type": "image", "url": URI},
    "image as a URI": {"type": "image", "image": URI},
    "path as a URI": {"type": "image", "path": URI},
    "PIL": {"type": "image", "image": PICTURE},
    "bytes": {"type": "image", "image": ENCODED},
    "bytearray": {"type": "image", "image": bytearray(ENCODED)},
    "array": {"type": "image", "image": np.asarray(PICTURE)},
    "tensor": {"type": "image", "image": torch.from_numpy(np.array(PICTURE)).movedim(-1, 0)},
    "memory": {"type": "image", "image": memoryview(ENCODED)},
    "file object": {"type": "image", "image": io.BytesIO(ENCODED)},
    "list of one": {"type": "image", "image": [PICTURE]},
    "lists of one, and nothing": {"type": "image", "image": [[None, PICTURE]]},
    "dict of datasets": {"type": "image", "image": {"bytes": ENCODED, "path": None}},
    "dict with a name": {"type": "image", "image": {"bytes": ENCODED, "path": "red.png"}},
    "columns filled up": {"type": "image", "image": None, "path": "", "base64": None, "url": URI, "text": None},
}


@pytest.mark.parametrize("item", FORMS.values(), ids=FORMS)
def test_what_answering_reads_training_reads(processor, item):
    messages = [{"role": "user", "content": [item, {"type": "text", "text": "q"}]}, ANSWER]
    pixels = processor.apply_chat_template(messages[:1], tokenize=True, return_dict=True, return_tensors="pt")
    record = {"messages": messages}
    rows, refused = RecordCheck(processor)(record, 0)
    assert refused == []
    batches = [LlavaDataCollator(processor)([row]) for row in (record, rows[0].row)]
    for batch in batches:
        torch.testing.assert_close(batch["pixel_values"], pixels["pixel_values"], rtol=0, atol=0)
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])


@pytest.mark.parametrize("item", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    "wrap", [lambda one: one, lambda one: [one], lambda one: [[one]]], ids=["one", "list", "rows"]
)
def test_every_form_is_read_at_every_door_again_and_again(processor, item, wrap):
    picture = find_picture(item)
    expected = processor.image_processor(PICTURE, return_tensors="pt")["pixel_values"]
    record = {"messages": PLACE, "images": wrap(picture)}
    for _ in range(2):
        for read in (
            lambda: processor(images=wrap(picture), text="<image> hi", return_tensors="pt"),
            lambda: processor.image_processor(wrap(picture), return_tensors="pt"),
            lambda: LlavaDataCollator(processor)([record]),
        ):
            torch.testing.assert_close(read()["pixel_values"], expected, rtol=0, atol=0)
        assert RecordCheck(processor)(record, 0)[1] == []


@pytest.mark.parametrize(
    "item",
    [
        {"type": "image", "image": [PICTURE, PICTURE]},
        {"type": "image", "image": PICTURE, "text": "q"},
        {"type": "image_url", "image_url": {"url": URI}, "text": "q"},
        *({"type": "text", "text": "q", key: URI} for key in ("image", "path", "url", "base64", "image_url")),
        {"type": "text", "text": "q", "image": PICTURE},
    ],
    ids=range(9),
)
def test_what_would_be_lost_is_refused_at_every_door(processor, item):
    messages = [{"role": "user", "content": [item]}, ANSWER]
    for read in (
        lambda: processor.apply_chat_template(messages[:1], tokenize=True),
        lambda: LlavaDataCollator(processor)([{"messages": messages}]),
    ):
        with pytest.raises(ValueError, match="expected (an item for each|one: make a place for each)"):
            read()
    assert RecordCheck(processor)({"messages": messages}, 0)[1][0].reason == "malformed content"


def test_what_answering_reads_data_sets_hold(processor, tmp_path):
    names = ("image_url", "base64", "url", "path as a URI")
    rows = [{"messages": [{"role": "user", "content": [FORMS[name]]}, ANSWER]} for name in names]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    loaded, _ = load_rows([DataSource(path=str(tmp_path / "rows.json"))])
    batch = LlavaDataCollator(processor)(list(loaded))
    assert len(batch["pixel_values"]) == len(names) and torch.equal(*batch["pixel_values"][::3])


@pytest.mark.parametrize("address", ["https://a.example/b.png", "file:///etc/passwd", "/etc/passwd", "../b.png"])
@pytest.mark.parametrize("form", ["image_url", "image", "path", "url", "dict"])
def test_policies_hold_for_every_form(processor, tmp_path, address, form):
    item = {
        "image_url": {"type": "image_url", "image_url": {"url": address}},
        "dict": {"type": "image", "image": {"bytes": None, "path": address}},
    }.get(form, {"type": "image", form: address})
    messages = [{"role": "user", "content": [item]}, ANSWER]
    for folder in (None, tmp_path):
        assert RecordCheck(processor)({"messages": messages}, 0, image_folder=folder)[1]
    for read in (
        lambda: LlavaDataCollator(processor)([{"messages": messages}]),
        lambda: processor.apply_chat_template(messages[:1], tokenize=True),
    ):
        with pytest.raises(ValueError, match="got the (text|URL)"):
            read()


def test_paths_in_the_folder_are_read_from_every_form(processor, tmp_path):
    PICTURE.save(tmp_path / "red.png")
    for item in (
        {"type": "image_url", "image_url": {"url": "red.png"}},
        {"type": "image", "path": "red.png"},
        {"type": "image", "image": {"bytes": None, "path": "red.png"}},
    ):
        messages = [{"role": "user", "content": [item]}, ANSWER]
        assert RecordCheck(processor)({"messages": messages}, 0, image_folder=tmp_path)[1] == []


def test_pictures_in_and_beside_the_messages_are_refused(processor):
    messages = [{"role": "user", "content": [FORMS["PIL"]]}, ANSWER]
    with pytest.raises(ValueError, match="row 'a' with 1 images in its messages and 1 beside"):
        LlavaDataCollator(processor)([{"id": "a", "messages": messages, "images": [PICTURE]}])


@pytest.mark.parametrize(
    "item", [{"type": "image_url", "image_url": URI}, {"type": "image", "base64": b"a"}, {"image": URI}]
)
def test_malformed_items_are_named(processor, item):
    messages = [{"role": "user", "content": [item]}, ANSWER]
    assert RecordCheck(processor)({"id": "a", "messages": messages}, 0)[1][0].reason == "malformed content"
    with pytest.raises(ValueError, match="row 'a' that cannot be written"):
        LlavaDataCollator(processor)([{"id": "a", "messages": messages}])


@pytest.mark.parametrize("question", ["<image>\nWhat?", [{"type": "text", "text": "<image>What?"}]])
def test_a_typed_placeholder_says_what_to_do(processor, question):
    prompt = processor.apply_chat_template([{"role": "user", "content": question}])
    assert "<image>" in prompt
    for images in (PICTURE, [PICTURE], [[PICTURE]]):
        with pytest.raises(ValueError, match=r'typed in a message is text; an item \{"type": "image"\}'):
            processor(images=images, text=prompt)


def test_placeholders_of_other_models_are_named(processor):
    with pytest.raises(ValueError, match=r"writes <image>, not <\|image\|>"):
        processor(images=PICTURE, text="USER: <|image|> hi")
    with pytest.raises(ValueError, match="in a prompt that no template wrote"):
        processor(images=PICTURE, text="USER: hi")
