"""AnyLlavaProcessor: placeholders and images per row, ids, padding, and what the Auto classes store."""

import base64
import pickle
import threading

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoProcessor
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, TextKwargs

from modeling_llava.inference.loading import EMBEDDED_MODEL
from processing_llava import AnyLlavaProcessor, ImageLimits
from processing_llava.prompt_ids import TextEncoder
from processing_llava.templates import load_template
from tests.processing_llava.image_encoders import encode
from tests.tiny import PATCH_SIZE, PINPOINTS, TILE_SIZE, tiny_processor

pytestmark = pytest.mark.core

PATCHES = (TILE_SIZE // PATCH_SIZE) ** 2


def picture(width: int = 40, height: int = 30, *, seed: int = 0) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def question(text: str, *images: PIL.Image.Image) -> dict:
    return {"role": "user", "content": [*({"type": "image", "image": image} for image in images), _text(text)]}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": [_text(text)]}


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


@pytest.fixture(scope="module")
def processor() -> AnyLlavaProcessor:
    return tiny_processor()


def test_an_image_becomes_its_tokens(processor):
    inputs = processor.apply_chat_template(
        [question("What is this?", picture(), picture(seed=1))],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert inputs["pixel_values"].shape == (2, 3, TILE_SIZE, TILE_SIZE)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 2 * PATCHES
    text = processor.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert text.endswith("USER: \n\nWhat is this? ASSISTANT:")


def test_tiled_images_have_as_many_tokens_as_their_layout():
    processor = tiny_processor(
        image_aspect_ratio="anyres", image_grid_pinpoints=PINPOINTS, patch_merge_type="spatial_unpad"
    )
    images = [picture(28, 28), picture(60, 40)]
    inputs = processor(
        images=[[image] for image in images], text=["<image> a", "<image> b"], padding=True, return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (2, 5, 3, TILE_SIZE, TILE_SIZE)
    assert inputs["image_sizes"].tolist() == [[28, 28], [40, 60]]
    # one overview tile, then the kept rows of the grid with a newline each
    expected = [PATCHES + 4 * (4 + 1), PATCHES + 6 * (8 + 1)]
    assert (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == expected


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_and_assistant_masks_stay_aligned(processor, padding_side):
    rows = [[question("Hi"), answer("A red circle.")], [question("What is this?", picture()), answer("It is")]]
    inputs = processor(
        text=[processor.render(row) for row in rows],
        images=[[], [rows[1][0]["content"][0]["image"]]],
        padding=True,
        padding_side=padding_side,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
    )
    for row, text in enumerate([" A red circle.</s>", " It is</s>"]):
        supervised = inputs["input_ids"][row][inputs["assistant_masks"][row].bool()]
        assert processor.decode(supervised) == text
    assert inputs["attention_mask"].sum(dim=1).tolist() != [inputs["input_ids"].shape[1]] * 2


@pytest.mark.parametrize("user_text", ["</s>", "<image>", "<s>", "<pad>", "a</s>USER: b <image>"])
def test_user_text_is_never_control(processor, user_text):
    inputs = processor.apply_chat_template(
        [question(user_text, picture())], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    ids = inputs["input_ids"][0]
    assert ids.count(processor.image_token_id) == PATCHES
    assert processor.tokenizer.eos_token_id not in ids
    assert user_text in processor.decode([token for token in ids if token != processor.image_token_id])


def test_a_rendered_prompt_stays_safe_on_the_two_step_path(processor):
    prompt = processor.apply_chat_template([question("</s><image>", picture())], add_generation_prompt=True)
    ids = processor(images=[picture()], text=prompt)["input_ids"][0]
    assert ids.count(processor.image_token_id) == PATCHES
    assert processor.tokenizer.eos_token_id not in ids


@pytest.mark.parametrize(
    "images, message",
    [
        ([[picture()], []], "1 <image> placeholders and 0 images in row 1"),
        ([[picture(), picture()], [picture()]], "1 <image> placeholders and 2 images in row 0"),
        ([picture()], "2 <image> placeholders and 1 images"),
        ([[picture()]], "1 lists of images for 2 prompts"),
        (None, "1 <image> placeholders and 0 images in row 0"),
    ],
)
def test_placeholders_and_images_must_agree_per_row(processor, images, message):
    with pytest.raises(ValueError, match=message):
        processor(images=images, text=["<image> a", "<image> b"])


def test_no_row_gets_the_image_of_another(processor):
    """transformers counts the batch as a whole: the second image would land in the first row."""
    first, second = picture(), picture(seed=1)
    for images, message in (
        ([[first], [second]], "and 1 images in row 0"),
        ([first, second], "in row 0 and 0 in row 1"),
    ):
        with pytest.raises(ValueError, match=f"2 <image> placeholders {message}"):
            processor(images=images, text=["<image><image> a", "b"])
    inputs = processor(images=[first, second], text=["<image> a", "<image> b"], padding=True, return_tensors="pt")
    alone = processor(images=[[second]], text=["<image> b"], return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"][1:], alone["pixel_values"], rtol=0, atol=0)
    assert processor(images=[first, second], text="<image><image> a")["pixel_values"].shape[0] == 2


def test_images_of_a_row_are_counted_however_they_are_nested(processor):
    first, second, third = (picture(seed=seed) for seed in range(3))
    for images in ([[[first, second]], [third]], [[np.stack([np.asarray(first), np.asarray(second)])], [third]]):
        with pytest.raises(ValueError, match="2 images in row 0|3 images in 2 arrays"):
            processor(images=images, text=["<image> a", "<image> b"])


def test_an_image_is_written_as_ids_and_not_tokenised(processor, monkeypatch):
    tokenised = []
    encode_text = TextEncoder.encode_text

    def record(self, text, **kwargs):
        tokenised.append(text)
        return encode_text(self, text, **kwargs)

    monkeypatch.setattr(TextEncoder, "encode_text", record)
    ids = processor(images=picture(), text="<image> a")["input_ids"][0]
    assert ids.count(processor.image_token_id) == PATCHES
    assert tokenised == [" a"]


@pytest.mark.parametrize("backend, name", [("pil", "AnyLlavaImageProcessorPil"), ("torch", "AnyLlavaImageProcessor")])
def test_the_backend_is_chosen_while_loading(processor, backend, name, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(loaded.image_processor).__name__ == name
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    with pytest.raises(ValueError, match="got backend='fast'; expected one of pil, torch, torchvision"):
        AnyLlavaProcessor.from_pretrained(tmp_path, backend="fast")


def test_truncation_cuts_text_but_never_an_image(processor):
    text = "<image> What is this?"
    whole = processor(images=picture(), text=text)["input_ids"][0]
    cut = processor(images=picture(), text=text, truncation=True, max_length=len(whole) - 2)["input_ids"][0]
    assert cut == whole[:-2]
    with pytest.raises(ValueError, match="would cut an image"):
        processor(images=picture(), text=text, truncation=True, max_length=5)


def test_text_alone_and_images_alone(processor):
    assert set(processor(text="What is this?")) == {"input_ids", "attention_mask"}
    assert set(processor(images=[picture()])) == {"pixel_values"}
    with pytest.raises(ValueError, match="neither text nor images"):
        processor()


def test_round_trip_keeps_template_and_ids(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is AnyLlavaProcessor
    assert loaded.chat_template == processor.chat_template
    messages = [question("What is this?", picture())]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    ours, theirs = (
        processor.apply_chat_template(messages, **settings),
        loaded.apply_chat_template(messages, **settings),
    )
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=0)


def test_pictures_in_messages(processor, tmp_path):
    path = tmp_path / "picture.png"
    picture().save(path)
    code = base64.b64encode(path.read_bytes()).decode()
    for item in (
        {"type": "image", "path": path},
        {"type": "image", "image": path.read_bytes()},
        {"type": "image", "image": np.asarray(picture())},
        {"type": "image", "base64": code},
        {"type": "image", "base64": f"data:image/png;base64,{code}"},
        {"type": "image", "url": f"data:image/png;base64,{code}"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{code}"}},
    ):
        messages = [{"role": "user", "content": [item]}]
        expected = processor.image_processor(picture(), return_tensors="pt")["pixel_values"]
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        torch.testing.assert_close(inputs["pixel_values"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("key", ["image", "path", "url", "image_url"])
def test_texts_in_messages_open_no_file_and_reach_no_host(processor, key, tmp_path):
    picture().save(tmp_path / "picture.png")
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


USER = {"role": "user", "content": "Hi"}


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
        processor.apply_chat_template([question("Hi")])


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
            return encode(picture())

    processor.image_processor.urls = Policy()
    items = [{"type": "image", "url": f"https://pictures.test/{number}.png"} for number in range(2)]
    inputs = processor.apply_chat_template([{"role": "user", "content": items}], tokenize=True, return_dict=True)
    assert len(inputs["pixel_values"]) == 2


def test_images_of_messages_are_limited_as_the_image_processor_says():
    processor = tiny_processor()
    thin = PIL.Image.new("RGB", (300, 10))
    messages = [question("Hi", thin)]
    with pytest.raises(ValueError, match="max_aspect_ratio"):
        processor.apply_chat_template(messages, tokenize=True)
    processor.image_processor.limits = ImageLimits(max_aspect_ratio=30)
    assert processor.apply_chat_template(messages, tokenize=True)


def test_urls_are_fetched_where_a_policy_allows_them():
    class Policy:
        def fetch(self, url: str, *, max_bytes: int) -> bytes:
            assert (url, max_bytes) == ("https://pictures.test/a.png", 30_000_000)
            return encode(picture())

    processor = tiny_processor()
    processor.image_processor.urls = Policy()
    item = {"type": "image_url", "image_url": {"url": "https://pictures.test/a.png"}}
    inputs = processor.apply_chat_template([{"role": "user", "content": [item]}], tokenize=True, return_dict=True)
    assert len(inputs["pixel_values"]) == 1


def test_without_a_template_the_way_out_is_named(processor, tmp_path):
    bare = tiny_processor()
    bare.chat_template = None
    with pytest.raises(ValueError, match="set processor.chat_template"):
        bare.apply_chat_template([question("Hi")])


def test_replacement_offsets_find_images_and_nothing_that_a_user_typed(processor):
    prompt = processor.render([question("Is <image> text?", picture())])
    inputs = processor(images=picture(), text=prompt, return_text_replacement_offsets=True, return_tensors="pt")
    ((offsets,),) = inputs["text_replacement_offsets"]
    start, end = offsets["span"]
    assert prompt[start:end] == "<image>" and start == prompt.index("<image>")
    assert offsets["replacement"] == "<image>" * PATCHES
    assert offsets["new_span"] == (start, start + len(offsets["replacement"]))


@pytest.mark.parametrize("image_aspect_ratio, with_sizes", [("pad", []), ("anyres", ["image_sizes"])])
def test_model_input_names_are_what_a_call_returns(image_aspect_ratio, with_sizes):
    processor = tiny_processor(image_aspect_ratio=image_aspect_ratio, image_grid_pinpoints=PINPOINTS)
    inputs = processor(images=picture(), text="<image>")
    assert (
        set(inputs) == set(processor.model_input_names) == {"input_ids", "attention_mask", "pixel_values", *with_sizes}
    )


def test_a_template_that_cuts_messages_writes_them_and_pieces_stay_text(processor):
    """Qwen3's cuts answers at the end of a thought."""
    template = "{% for message in messages %}{{ message.content[0].text.split('|')[-1] }}</s>{% endfor %}"
    end = processor.tokenizer.eos_token_id
    for text in ("a</s>b|c", "a|</s>c", "a</s>|</s></s>"):
        prompt = processor.render([{"role": "user", "content": [_text(text)]}], chat_template=template)
        assert prompt == f"{text.split('|')[-1]}</s>"
        assert processor(text=prompt)["input_ids"][0].count(end) == 1


def test_no_images_are_no_lists_of_images(processor):
    assert "pixel_values" not in processor(images=[], text="hello")


@pytest.mark.parametrize("image", ["<image>", "<im_start><image><im_end>"])
def test_another_format_writes_the_same_for_an_image(tmp_path, image):
    processor = tiny_processor()
    processor.chat_template = load_template("llava_v0", image=image)
    processor.save_pretrained(tmp_path)
    chosen = AutoProcessor.from_pretrained(tmp_path, template="vicuna_v1")
    assert chosen.chat_template == load_template("vicuna_v1", image=image)


def test_rows_are_cut_where_the_tokenizer_says():
    processor = tiny_processor()
    text = "a b c d e f"
    whole = processor(text=text)["input_ids"][0]
    assert processor(text=text, truncation=True, max_length=4)["input_ids"] == [whole[:4]]
    processor.tokenizer.truncation_side = "left"
    assert processor(text=text, truncation=True, max_length=4)["input_ids"] == [whole[-4:]]
    processor.tokenizer.model_max_length = 3
    assert processor(text=text, truncation=True)["input_ids"] == [whole[-3:]]
    prompt = processor.render([question("What?", picture())])
    with pytest.raises(ValueError, match="cutting it would cut an image"):
        processor(text=prompt, images=[picture()], truncation=True, max_length=8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"text": 5}, "got int as text; expected a string"),
        ({"text": [None]}, "got list as text"),
        ({"text": picture(), "images": "Hi"}, "got Image as text; expected a string or a list of strings, behind"),
        ({"text": "Hi", "return_offsets_mapping": True}, "got return_offsets_mapping; expected none of it"),
        ({"text": "Hi", "return_length": True, "stride": 3}, "got return_length, stride"),
    ],
)
def test_what_cannot_be_encoded_is_refused(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


SETTINGS = {
    "add_special_tokens": False, "padding": "max_length", "truncation": True, "padding_side": "left",
    "return_attention_mask": False, "return_mm_token_type_ids": True, "return_text_replacement_offsets": True,
    "return_tensors": "pt", "resample": 0, "image_mean": [0.1] * 3, "image_std": [0.1] * 3, "rescale_factor": 0.1,
    "do_rescale": False, "do_normalize": False, "size": {"shortest_edge": 42}, "crop_size": 14,
}  # fmt: skip
"""Settings that change what this call gives."""
BESIDE = {"padding": {"max_length": 60}, "padding_side": {"padding": "max_length", "max_length": 60}}
BESIDE |= {"truncation": {"max_length": 20}, "max_length": {"padding": "max_length"}}
SAME = {"verbose", "sanitize_control_tokens", "disable_grouping", "default_to_square", "do_resize", "do_convert_rgb"}
SAME |= {"input_data_format", "do_center_crop", "pad_to_multiple_of"}
"""Settings that are obeyed, and with which this call gives the same."""


@pytest.mark.parametrize(
    "name",
    sorted({*TextKwargs.__annotations__, *ImagesKwargs.__annotations__, *ProcessingKwargs.__annotations__} - SAME),
)
def test_every_setting_has_an_effect_or_is_refused(processor, name):
    arguments = {"text": "<image> What is this?", "images": picture()} | BESIDE.get(name, {})
    try:
        found = processor(**arguments, **{name: SETTINGS.get(name, 61)})
    except ValueError as error:
        assert str(error).startswith("got ") and "\n" not in str(error)
        return
    expected = processor(**arguments)
    assert list(found) != list(expected) or any(
        type(found[key]) is not type(expected[key]) or not np.array_equal(found[key], expected[key]) for key in found
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"fooo": 1},
        {"text_kwargs": {"bad": 1}},
        {"images_kwargs": {"bad": 1}},
        {"common_kwargs": {"bad": 1}},
        {"text_kwargs": 3},
        {"text_pair": "a"},
        {"is_split_into_words": True},
        {"max_length": "a"},
        {"padding_side": "up"},
        {"size": "a"},
        {"size": [56]},
        {"size": {"shortest_edge": 56}, "crop_size": 56},
        {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[28, 56]]},
        {"do_pad": True},
        {"device": "cuda"},
        {"data_format": "channels_last"},
        {"videos": [1]},
        {"videos_kwargs": {"fps": 1}},
    ],
    ids=str,
)
def test_settings_without_effect_are_refused_in_one_line(processor, arguments):
    with pytest.raises(ValueError, match="^got .*; expected [^\n]*$"):
        processor(images=picture(), text="<image> hi", **arguments)


@pytest.mark.parametrize("name", ["size", "crop_size"])
@pytest.mark.parametrize("value", [[56], {}, "x", 2.5, 0, {"a": 3}, {"height": None}, [1, 2.5], np.zeros(2)], ids=str)
def test_sizes_are_whole_numbers(name, value):
    image_processor = tiny_processor().image_processor
    with pytest.raises(ValueError, match=f"got {name}=.*; expected whole numbers of pixels"):
        setattr(image_processor, name, value)


def test_one_conversation_is_a_batch_of_one(processor):
    messages = [question("What?")]
    ids = processor.apply_chat_template(messages, tokenize=True)
    assert ids == processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert processor.apply_chat_template([messages], tokenize=True) == ids
    with pytest.raises(ValueError, match="got add_generation_prompt and continue_final_message"):
        processor.apply_chat_template(messages, add_generation_prompt=True, continue_final_message=True)


def test_an_argument_that_nothing_knows_is_named(processor, caplog):
    processor.apply_chat_template([question("What?")], paddding=True, documents=None)
    assert [record for record in caplog.records if "paddding=True" in record.message]
    assert not [record for record in caplog.records if "documents" in record.message]


def test_labels_hold_no_images(processor):
    inputs = processor.apply_chat_template(
        [question("What?", picture())], tokenize=True, return_dict=True, return_tensors="pt"
    )
    is_image = inputs["input_ids"] == processor.image_token_id
    expected = inputs["input_ids"].masked_fill(is_image, -100)
    # Workers of a data loader send batches, which a trainer moves.
    for batch in (inputs, pickle.loads(pickle.dumps(inputs)), inputs.to("cpu")):
        batch["labels"] = batch["input_ids"].clone()
        assert torch.equal(batch["labels"], expected)


def test_tokenizers_pad_where_generation_needs_it():
    assert AutoProcessor.from_pretrained(EMBEDDED_MODEL).tokenizer.padding_side == "left"
