"""Batches for training: what is supervised, and rows that cannot be learned from."""

import PIL.Image
import pytest

from processing_llava.collator import IGNORED_LABEL, LlavaDataCollator
from processing_llava.conversations import convert_record
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
