"""Messages of strangers: their form, the pictures in them, and what a template cannot write."""

import base64
import threading

import numpy as np
import PIL.Image
import pytest
import torch

from processing_llava import AnyLlavaProcessor, ImageLimits
from processing_llava.templates import load_template
from tests.processing_llava.image_encoders import encode
from tests.tiny import tiny_processor

pytestmark = pytest.mark.core

PICTURE = PIL.Image.linear_gradient("L").resize((40, 30)).convert("RGB")
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def processor() -> AnyLlavaProcessor:
    return tiny_processor()


def test_pictures_in_messages(processor, tmp_path):
    path = tmp_path / "picture.png"
    PICTURE.save(path)
    code = base64.b64encode(path.read_bytes()).decode()
    for item in (
        {"type": "image", "path": path},
        {"type": "image", "image": path.read_bytes()},
        {"type": "image", "image": np.asarray(PICTURE)},
        {"type": "image", "base64": code},
        {"type": "image", "base64": f"data:image/png;base64,{code}"},
        {"type": "image", "url": f"data:image/png;base64,{code}"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{code}"}},
    ):
        messages = [{"role": "user", "content": [item]}]
        expected = processor.image_processor(PICTURE, return_tensors="pt")["pixel_values"]
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        torch.testing.assert_close(inputs["pixel_values"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("key", ["image", "path", "url", "image_url"])
def test_texts_in_messages_open_no_file_and_reach_no_host(processor, key, tmp_path):
    PICTURE.save(tmp_path / "picture.png")
    for text, message in (
        (str(tmp_path / "picture.png"), "no text opens a file here"),
        ("https://example.com/a.png", "URLs are not fetched here"),
        (f"file://{tmp_path}/picture.png", "URLs are not fetched here"),
    ):
        item = {"type": "image", key: text}
        if key == "image_url":
            item = {"type": "image_url", "image_url": {"url": text}}
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template([{"role": "user", "content": [item]}], tokenize=True)
    with pytest.raises(ValueError, match="no text opens a file here"):
        processor(images=str(tmp_path / "picture.png"), text="<image>")


def nest(depth: int) -> list:
    return [nest(depth - 1)] if depth else []


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], r"got the conversation \[\]; expected a list of messages"),
        ([[]], "got the conversation"),
        ([[USER], []], "got the conversation"),
        (USER, "got the conversation"),
        ("Hi", "got the conversation"),
        (None, "got the conversation"),
        ([None], "got message 0 with None; expected {"),
        ([USER, {"content": "Hi"}], "got message 1 with .*; expected {"),
        ([{"role": ["user"], "content": "Hi"}], "got message 0 with"),
        ([{"role": "user"}], "the content None; expected a text or a list of items"),
        ([{"role": "user", "content": None, "tool_calls": [1]}], "the content None"),
        ([{"role": "user", "content": 7}], "the content 7"),
        ([{"role": "user", "content": {"type": "text"}}], "the content {"),
        ([{"role": "user", "content": ["Hi"]}], "the item 'Hi'; expected"),
        ([{"role": "user", "content": [{"text": "Hi"}]}], "the item {'text': 'Hi'}; expected"),
        ([{"role": "user", "content": [{"type": ["text"], "text": "Hi"}]}], "the item"),
        ([{"role": "user", "content": [{"type": "text"}]}], "the text None; expected a string"),
        ([{"role": "user", "content": [{"type": "text", "text": b"Hi"}]}], "the text b'Hi'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "got an image item without a picture"),
        ([{"role": "user", "content": [{"type": "image", "base64": 7}]}], "the base64 7; expected a string"),
        ([{"role": "user", "content": [{"type": "image", "image": nest(500)}]}], "101 deep in each other"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}]}], "the image_url 'data:,'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "the image_url {}; expected"),
        ([{"role": "user", "content": "half \ud83d"}], "text that is not Unicode"),
        ([{"role": "user", "content": [{"type": "text", "text": "\udc00"}]}], "text that is not Unicode"),
        ([{"role": "user", "content": [{"type": "video"}]}], "the chat template cannot write"),
        ([{"role": "tool", "content": "1"}], "the chat template cannot write"),
    ],
)
def test_malformed_messages_are_named(processor, conversation, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(conversation, tokenize=True)


def test_what_another_template_cannot_write_is_named():
    processor = tiny_processor()
    system = {"role": "system", "content": "Be brief."}
    processor.chat_template = load_template("gemma")
    with pytest.raises(ValueError, match="the chat template cannot write .*system message"):
        processor.apply_chat_template([system, USER])
    processor.chat_template = "{% for message in messages %}{{ 'USER: ' + message.content }}{% endfor %}"
    assert processor.apply_chat_template([USER]) == "USER: Hi"
    with pytest.raises(ValueError, match="the chat template cannot write .*can only concatenate str"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])


def test_an_answer_that_calls_tools_needs_no_content():
    processor = tiny_processor()
    processor.chat_template = (
        "{% for message in messages %}{{ message.content or message.tool_calls | tojson }}{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "search"}]}
    assert "search" in processor.apply_chat_template([USER, call], tokenize=False)
    assert processor.apply_chat_template([USER, call], tokenize=True)


def test_images_of_a_conversation_are_loaded_in_threads():
    """Two wait for each other; one after the other, they would wait forever."""
    processor = tiny_processor()
    processor.image_processor.num_threads = 2
    both = threading.Barrier(2, timeout=30)

    class Policy:
        def fetch(self, url: str, *, max_bytes: int) -> bytes:
            both.wait()
            return encode(PICTURE)

    processor.image_processor.urls = Policy()
    items = [{"type": "image", "url": f"https://pictures.test/{number}.png"} for number in range(2)]
    inputs = processor.apply_chat_template([{"role": "user", "content": items}], tokenize=True, return_dict=True)
    assert len(inputs["pixel_values"]) == 2


def test_images_of_messages_are_limited_as_the_image_processor_says():
    processor = tiny_processor()
    thin = PIL.Image.new("RGB", (300, 10))
    messages = [{"role": "user", "content": [{"type": "image", "image": thin}]}]
    with pytest.raises(ValueError, match="max_aspect_ratio"):
        processor.apply_chat_template(messages, tokenize=True)
    processor.image_processor.limits = ImageLimits(max_aspect_ratio=30)
    assert processor.apply_chat_template(messages, tokenize=True)


def test_urls_are_fetched_where_a_policy_allows_them():
    class Policy:
        def fetch(self, url: str, *, max_bytes: int) -> bytes:
            assert (url, max_bytes) == ("https://pictures.test/a.png", 30_000_000)
            return encode(PICTURE)

    processor = tiny_processor()
    processor.image_processor.urls = Policy()
    item = {"type": "image_url", "image_url": {"url": "https://pictures.test/a.png"}}
    inputs = processor.apply_chat_template([{"role": "user", "content": [item]}], tokenize=True, return_dict=True)
    assert len(inputs["pixel_values"]) == 1
