"""Batches for training: what is supervised, and rows that cannot be learned from."""

import PIL.Image
import pytest
import transformers
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from processing_llava.data.collator import LlavaDataCollator
from processing_llava.data.conversations import convert_record
from processing_llava.data.data_check import RecordCheck
from processing_llava.prompt_inputs import IGNORED_LABEL
from tests.tiny import PATCH_SIZE, TILE_SIZE, tiny_processor

PATCHES = (TILE_SIZE // PATCH_SIZE) ** 2


@pytest.fixture
def image_folder(tmp_path):
    PIL.Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return tmp_path


def row(image_folder, *turns: str, image: str | list[str] | None = None, row_id: str = "row") -> dict:
    conversations = [
        {"from": "human" if index % 2 == 0 else "gpt", "value": value} for index, value in enumerate(turns)
    ]
    record = {"id": row_id, "conversations": conversations} | ({} if image is None else {"image": image})
    return convert_record(record, 0, image_folder=image_folder)


def test_labels_are_the_answers_and_their_end_tokens(image_folder):
    processor = tiny_processor()
    rows = [
        row(image_folder, "<image>\nWhat is this?", "A circle.", "What color?", "Red.", image="red.png"),
        row(image_folder, "Hello", "Hi."),
    ]
    batch = LlavaDataCollator(processor)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [PATCHES, 0]
    supervised = [processor.decode(labels[labels != IGNORED_LABEL]) for labels in batch["labels"]]
    assert supervised == [" A circle.</s> Red.</s>", " Hi.</s>"]
    learned = batch["labels"] != IGNORED_LABEL
    assert batch["labels"][learned].tolist() == batch["input_ids"][learned].tolist()


@pytest.mark.parametrize("answer", ["is it? ASSISTANT: yes", "the token </s> ends", "<unk> [PAD] <pad>"])
def test_answers_that_the_original_drops_in_silence_are_learned(image_folder, answer):
    processor = tiny_processor()
    batch = LlavaDataCollator(processor)([row(image_folder, "Q", answer)])
    labels = batch["labels"][0]
    ids = labels[labels != IGNORED_LABEL].tolist()
    assert processor.decode(ids) == f" {answer}</s>"
    assert ids.count(processor.tokenizer.eos_token_id) == 1


def test_a_row_without_images_has_no_pixels(image_folder):
    assert "pixel_values" not in LlavaDataCollator(tiny_processor())([row(image_folder, "Q", "A")])


def test_rows_that_cannot_be_trained_on_are_named(image_folder):
    processor = tiny_processor()
    long_row = row(image_folder, "<image>\nQ", "A", image="red.png", row_id="000123")
    with pytest.raises(ValueError, match="'000123' with .* tokens; expected at most max_length=20"):
        LlavaDataCollator(processor, max_length=20)([long_row])
    unanswered = {"id": "000124", "images": [], "messages": [{"role": "user", "content": "Q"}]}
    with pytest.raises(ValueError, match="'000124' without a token to learn"):
        LlavaDataCollator(processor)([unanswered])


def test_packed_rows_are_the_padded_ones_end_to_end(image_folder):
    processor = tiny_processor()
    rows = [
        row(image_folder, "<image>\nWhat is this?", "A circle.", image="red.png"),
        row(image_folder, "Hello", "Hi."),
        row(image_folder, "<image><image>\nSame?", "Yes.", image=["red.png", "red.png"]),
    ]
    padded = LlavaDataCollator(processor)(rows)
    packed = LlavaDataCollator(processor, packed=True)(rows)
    assert "attention_mask" not in packed
    lengths = padded["attention_mask"].sum(dim=1).tolist()
    assert packed["cu_seq_lens_q"].tolist() == [0, lengths[0], lengths[0] + lengths[1], sum(lengths)]
    assert packed["max_length_q"] == max(lengths)
    for index, length in enumerate(lengths):
        place = slice(*packed["cu_seq_lens_q"][index : index + 2].tolist())
        assert packed["input_ids"][0, place].tolist() == padded["input_ids"][index, :length].tolist()
        assert packed["labels"][0, place].tolist() == padded["labels"][index, :length].tolist()
        assert packed["position_ids"][0, place].tolist() == list(range(length))
    assert packed["pixel_values"].equal(padded["pixel_values"])


def test_number_of_images_is_checked(image_folder):
    broken = row(image_folder, "<image>\nWhat is this?", "A circle.", image="red.png", row_id="000125")
    broken["images"] = []
    with pytest.raises(ValueError, match="'000125' with 1 <image> placeholders and 0 images"):
        LlavaDataCollator(tiny_processor())([broken])


def test_rows_of_trl(image_folder):
    picture = PIL.Image.open(image_folder / "red.png")
    answer = {"role": "assistant", "content": "A circle."}
    items = [{"type": "image"}, {"type": "text", "text": "What?"}]
    collator = LlavaDataCollator(tiny_processor())
    expected = collator([{"images": [picture], "messages": [{"role": "user", "content": items}, answer]}])
    texts = [{"role": "user", "content": "What?"}, answer]
    for row in ({"images": [picture]}, {"images": (picture,)}, {"image": picture}):
        assert collator([{**row, "messages": texts}])["input_ids"].equal(expected["input_ids"])
    assert "pixel_values" not in collator([{"messages": texts}])
    typed = {"images": [picture], "messages": [{"role": "user", "content": "<image> <image>\nWhat?"}, answer]}
    with pytest.raises(ValueError, match="2 <image> placeholders and 1 images; .* what is typed is text"):
        collator([typed])


def say(role: str, *items) -> dict:
    return {"role": role, "content": items[0] if isinstance(items[0], str) else list(items)}


PLACE, WHAT = {"type": "image"}, {"type": "text", "text": "What?"}
ANSWER, BRIEF = say("assistant", "A circle."), say("system", "Be brief.")
ROWS = {
    "no place": ([say("user", "What?"), ANSWER], [PLACE, WHAT]),
    "no place among items": ([say("user", WHAT), ANSWER], [PLACE, WHAT]),
    "no place, in a second turn": ([say("user", "What?"), ANSWER, say("user", "Sure?"), ANSWER], [PLACE, WHAT]),
    "no place, after a system message": ([BRIEF, say("user", "What?"), ANSWER], [PLACE, WHAT]),
    "a typed place": ([say("user", "<image>\nWhat?"), ANSWER], [PLACE, WHAT]),
    "a typed place behind": ([say("user", "What?\n<image>"), ANSWER], [PLACE, WHAT]),
    "a place": ([say("user", PLACE, WHAT), ANSWER], [PLACE, WHAT]),
    "a place behind": ([say("user", WHAT, PLACE), ANSWER], [WHAT, PLACE]),
    "a place, in a second turn": ([say("user", "Hi."), ANSWER, say("user", PLACE, WHAT), ANSWER], None),
    "two pictures, no place": ([say("user", "What?"), ANSWER], [PLACE, PLACE, WHAT]),
    "two pictures, two places": ([say("user", PLACE, PLACE, WHAT), ANSWER], [PLACE, PLACE, WHAT]),
}


NOT_FOR_TRL = ("no place among items", "a typed place", "a typed place behind", "a place, in a second turn")
"""It counts other places, or takes them for text."""


@pytest.mark.parametrize("way", ["messages", "prompt and completion", "conversations"])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_the_same_at_every_door(image_folder, tmp_path, name, way):
    """A recipe, check-data, this collator alone, and answering write the same ids; where TRL takes it, TRL too."""
    messages, content = ROWS[name]
    pictures = [image_folder / "red.png"] * (2 if name.startswith("two") else 1)
    turns = {"messages": messages}
    if way == "conversations":
        if not all(isinstance(message["content"], str) for message in messages):
            pytest.skip("their turns are texts")
        turns = {"conversations": [{"from": message["role"], "value": message["content"]} for message in messages]}
    elif way == "prompt and completion":
        if len(messages) > 3:
            pytest.skip("an answer in the prompt is refused")
        turns = {"prompt": messages[:-1], "completion": messages[-1:]}
    record, processor = {"images": pictures, **turns}, tiny_processor()
    collator = LlavaDataCollator(processor)

    [measured], refused = RecordCheck(processor)(record, 0)
    trained = collator([convert_record(record, 0)])
    assert not refused and measured.num_tokens == trained["input_ids"].shape[1]
    if way != "conversations":
        assert collator([record])["input_ids"].equal(trained["input_ids"])
        assert collator([record])["labels"].equal(trained["labels"])

    if content is None:
        asked = messages
    else:
        question = next(message for message in messages if message["role"] == "user")
        asked = [{**message, "content": content} if message is question else message for message in messages]
    remaining = iter(pictures)
    asked = [
        {**message, "content": [{**item, "path": next(remaining)} if item is PLACE else item for item in content]}
        if isinstance(content := message["content"], list)
        else message
        for message in asked
    ]
    answered = processor.apply_chat_template(asked, tokenize=True, return_dict=True, return_tensors="pt")
    assert answered["input_ids"].equal(trained["input_ids"])
    assert answered["pixel_values"].equal(trained["pixel_values"])

    if name not in NOT_FOR_TRL and way != "conversations":
        theirs = DataCollatorForVisionLanguageModeling(processor, max_length=None)
        opened = [PIL.Image.new("RGB", (40, 30), "red") for _ in pictures]
        ids = theirs([{**turns, "images": opened}])["input_ids"]
        # It takes for granted that a template writes the token that begins a text.
        assert ids.equal(trained["input_ids"][:, 1:])


def test_answers_in_a_prompt_are_refused_alike():
    turns = {"prompt": [say("user", "Hi."), ANSWER, say("user", "What?")], "completion": [ANSWER]}
    for read in (lambda row: convert_record(row, 0), lambda row: LlavaDataCollator(tiny_processor())([row])):
        with pytest.raises(ValueError, match="got an answer in 'prompt' in record .*; put all turns into 'messages'"):
            read(turns)


@pytest.mark.parametrize("prompt", ["What?", [{"role": "user", "content": "What?"}]])
def test_prompt_and_completion_are_refused(prompt):
    rows = [{"prompt": prompt, "completion": "A circle."}]
    with pytest.raises(ValueError, match=r"'number 1 in its batch' with the keys \['completion', 'prompt'\]; "):
        LlavaDataCollator(tiny_processor())(rows)


def test_bad_rows_without_id_are_named_by_their_number(image_folder):
    rows = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": text}]} for text in "A "]
    rows[1]["messages"].pop()
    with pytest.raises(ValueError, match="'number 2 in its batch' without a token to learn"):
        LlavaDataCollator(tiny_processor())(rows)
    collator = LlavaDataCollator(tiny_processor(), on_bad_row="skip")
    assert len(collator([*rows, {"id": 7, "messages": []}])["input_ids"]) == 1
    assert collator.skipped == ["number 2 in its batch", "7"]


def bad_rows(image_folder) -> dict[str, dict]:
    """One of every kind."""
    bad = {name: row(image_folder, "<image>\nQ", "A", image="red.png", row_id=name) for name in ("lost", "broken")}
    (image_folder / "broken.png").write_bytes(b"no picture")
    bad["lost"]["images"] = [image_folder / "lost.png"]
    bad["broken"]["images"] = [image_folder / "broken.png"]
    bad["text"] = bad["lost"] | {"id": "text", "images": ["red.png"]}
    bad["too many"] = bad["lost"] | {"id": "too many", "images": [image_folder / "red.png"] * 2}
    bad["unanswered"] = {"id": "unanswered", "images": [], "messages": [{"role": "user", "content": "Q"}]}
    bad["order"] = {"id": "order", "images": [], "messages": [{"role": "assistant", "content": "A"}]}
    bad["long"] = row(image_folder, "Q " * 200, "A", row_id="long")
    return bad


KINDS_OF_BAD_ROWS = ("lost", "broken", "text", "too many", "unanswered", "order", "long")


@pytest.mark.parametrize("name", KINDS_OF_BAD_ROWS)
def test_a_bad_row_is_named(image_folder, name):
    good = row(image_folder, "<image>\nQ", "A", image="red.png", row_id="good")
    with pytest.raises(ValueError, match=name) as caught:
        LlavaDataCollator(tiny_processor(), max_length=200)([good, bad_rows(image_folder)[name]])
    assert type(caught.value) is ValueError and "good" not in str(caught.value)


@pytest.mark.parametrize("packed", [False, True])
def test_bad_rows_are_skipped_counted_and_reported(image_folder, packed, caplog):
    good = [row(image_folder, "<image>\nQ", f"A{n}", image="red.png", row_id=f"good {n}") for n in range(2)]
    bad = bad_rows(image_folder)
    assert set(bad) == set(KINDS_OF_BAD_ROWS)
    collator = LlavaDataCollator(tiny_processor(), max_length=200, packed=packed, on_bad_row="skip")
    transformers.utils.logging.enable_propagation()
    try:
        batch = collator([good[0], *bad.values(), good[1]])
    finally:
        transformers.utils.logging.disable_propagation()
    expected = LlavaDataCollator(tiny_processor(), packed=packed)(good)
    assert collator.skipped == list(bad)
    for name, value in expected.items():
        assert batch[name] == value if isinstance(value, int) else batch[name].equal(value)
    for name in bad:
        assert any(f"row {name!r} is skipped, " in record.message for record in caplog.records), name
    assert collator(good)["input_ids"].equal(expected["input_ids"]) and len(collator.skipped) == len(bad)


def test_a_batch_of_bad_rows_alone_is_an_error(image_folder):
    bad = bad_rows(image_folder)
    collator = LlavaDataCollator(tiny_processor(), on_bad_row="skip")
    with pytest.raises(ValueError, match="no row can be trained on: lost, broken; .* the first says: .*lost.png"):
        collator([bad["lost"], bad["broken"]])


@pytest.mark.parametrize("packed", [False, True])
def test_the_last_good_row_stands_in_for_a_batch_of_bad_ones(image_folder, packed):
    good = [row(image_folder, "<image>\nQ", f"A{n}", image="red.png", row_id=f"good {n}") for n in range(2)]
    bad = bad_rows(image_folder)
    collator = LlavaDataCollator(tiny_processor(), packed=packed, on_bad_row="skip")
    collator(good)
    batch = collator([bad["lost"], bad["broken"]])
    assert collator.skipped == ["lost", "broken"]
    assert batch["input_ids"].equal(LlavaDataCollator(tiny_processor(), packed=packed)(good[:1])["input_ids"])


def test_other_ways_to_treat_bad_rows_are_refused():
    with pytest.raises(ValueError, match="got on_bad_row='ignore'; expected one of raise, skip"):
        LlavaDataCollator(tiny_processor(), on_bad_row="ignore")
