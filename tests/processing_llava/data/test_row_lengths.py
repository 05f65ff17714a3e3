"""Lengths are those of training, and long rows are kept, dropped or split, never cut."""

import copy

import PIL.Image
import pytest

from processing_llava import AnyLlavaProcessor
from processing_llava.data.collator import LlavaDataCollator
from processing_llava.data.conversations import convert_record
from processing_llava.data.data_bounds import RefusedRecord
from processing_llava.data.row_lengths import FITS, KEPT, PART, fit_row, measure_row, read_image_sizes, split_row
from processing_llava.image_limits import DEFAULT_LIMITS
from processing_llava.prompt_inputs import IGNORED_LABEL
from processing_llava.templates import load_template
from tests.processing_llava.tokenizers_of_each_kind import load_sentencepiece
from tests.tiny import PINPOINTS, tiny_processor


@pytest.fixture
def pictures(tmp_path):
    for name, size in (("wide.jpg", (80, 30)), ("tall.jpg", (20, 60))):
        PIL.Image.effect_noise(size, 50).save(tmp_path / name)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (80, 30), "red").save(tmp_path / "turned.jpg", exif=exif)
    return tmp_path


def make_row(*turns: str, images: tuple[str, ...] = (), folder=None, system: str | None = None) -> dict:
    messages = [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    messages = ([] if system is None else [{"role": "system", "content": system}]) + messages
    return convert_record({"id": "7", "images": list(images), "messages": messages}, 0, image_folder=folder)


def sentencepiece_processor() -> AnyLlavaProcessor:
    tokenizer = copy.deepcopy(load_sentencepiece(legacy=True))
    tokenizer.pad_token = tokenizer.unk_token  # as in the original
    return AnyLlavaProcessor(tiny_processor().image_processor, tokenizer, load_template("vicuna_v1"), patch_size=7)


@pytest.mark.parametrize("aspect_ratio", ["pad", "anyres"])
@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("visual_tokens", [None, 12])
def test_a_row_is_as_long_as_its_training_batch(pictures, aspect_ratio, decode, visual_tokens):
    pinpoints = PINPOINTS if aspect_ratio == "anyres" else None
    processor = tiny_processor(
        image_aspect_ratio=aspect_ratio, image_grid_pinpoints=pinpoints, visual_tokens=visual_tokens
    )
    names = ("wide.jpg", "tall.jpg", "turned.jpg")
    row = make_row("<image><image><image>Same?", "No.", "Sure?", "Yes.", images=names, folder=pictures)
    sizes = read_image_sizes(row, decode=decode, limits=DEFAULT_LIMITS)
    assert sizes == [(30, 80), (60, 20), (80, 30)]
    measured = measure_row(row, processor, sizes)
    labels = LlavaDataCollator(processor)([row])["labels"]
    assert (measured.num_tokens, measured.num_supervised) == (labels.numel(), (labels != IGNORED_LABEL).sum())


@pytest.mark.parametrize("answer", ["He said: ASSISTANT: yes", "the token </s> ends", "a \u2603 and <unk>"])
def test_answers_that_the_original_drops_in_silence_are_learned(answer):
    processor = sentencepiece_processor()
    row = make_row("Q", answer, "Again?", "No.")
    labels = LlavaDataCollator(processor)([row])["labels"][0]
    learned = labels[labels != IGNORED_LABEL].tolist()
    assert learned.count(processor.tokenizer.eos_token_id) == 2
    assert measure_row(row, processor, []).num_supervised == len(learned)
    end = learned.index(processor.tokenizer.eos_token_id)
    assert processor.tokenizer.decode(learned[:end]).strip() == answer


def test_the_empty_answer_that_the_original_drops_in_silence_is_refused_by_id():
    with pytest.raises(RefusedRecord, match="empty answer at position 1 in record '7'"):
        make_row("Q", "", "Again?", "No.")


def test_rows_that_a_format_cannot_write_or_that_teach_nothing_are_refused():
    for row, template, reason in (
        (make_row("Q", "A", "Q", "A"), "plain", "not for this format"),
        (make_row("Q"), "vicuna_v1", "nothing to learn"),
    ):
        with pytest.raises(RefusedRecord) as caught:
            measure_row(row, tiny_processor(template=template), [])
        assert (caught.value.record_id, caught.value.reason) == ("7", reason)


@pytest.mark.parametrize(
    ("damage", "reason"), [(None, "missing image"), (b"no picture", "unreadable image"), (b"half", "unreadable image")]
)
def test_images_that_cannot_be_opened_are_refused(pictures, damage, reason):
    path = pictures / "wide.jpg"
    whole = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(whole[: len(whole) // 2] if damage == b"half" else damage)
    row = make_row("<image>Q", "A", images=("wide.jpg",), folder=pictures)
    with pytest.raises(RefusedRecord) as caught:
        read_image_sizes(row, decode=True, limits=DEFAULT_LIMITS)
    assert caught.value.reason == reason
    if damage == b"half":
        assert read_image_sizes(row, decode=False, limits=DEFAULT_LIMITS) == [(30, 80)]


def turns_of(row: dict) -> list[str]:
    """Texts, with an `I` for each image."""
    return [
        "".join("I" if item["type"] == "image" else item["text"] for item in message["content"])
        for message in row["messages"]
    ]


def test_a_split_row_keeps_system_message_images_and_exchanges():
    row = make_row("<image>a", "b", "c", "d", "<image>e", "f", "g", "h", "i", images=(b"1", b"2"), system="S")
    parts, left_out = split_row(row, lambda part: len(part["messages"]) <= 5)
    assert [turns_of(part) for part in parts] == [["S", "Ia", "b", "c", "d"], ["S", "IIe", "f", "g", "h"]]
    assert [part["images"] for part in parts] == [[b"1"], [b"1", b"2"]]
    assert [part["id"] for part in parts] == ["7#1", "7#2"]
    assert left_out == []


def test_an_exchange_too_long_alone_is_left_out_and_closes_a_part():
    row = make_row("a", "b", "<image>" + "c" * 99, "d", "e", "f", "g", "h", images=(b"1",))
    parts, left_out = split_row(row, lambda part: sum(map(len, turns_of(part))) <= 10)
    assert [turns_of(part) for part in parts] == [["a", "b"], ["Ie", "f", "g", "h"]]
    assert left_out == [2]
    assert split_row(row, lambda part: False) == ([], [1, 2, 3, 4])


def test_the_row_itself_is_not_changed_by_splitting():
    row = make_row("<image>a", "b", "c", "d", images=(b"1",))
    before = copy.deepcopy(row)
    split_row(row, lambda part: len(part["messages"]) <= 2)
    assert row == before


def test_long_rows_are_kept_dropped_or_split(pictures):
    processor = tiny_processor()
    row = make_row("<image>\nWhat?", "A circle.", "Which?", "Red.", images=("wide.jpg",), folder=pictures)
    sizes = [(30, 80)]
    length = measure_row(row, processor, sizes).num_tokens

    def fit(max_length, too_long):
        rows, refused = fit_row(row, processor, sizes, max_length=max_length, too_long=too_long)
        return [(measured.row["id"], measured.fate) for measured in rows], [error.reason for error in refused]

    assert fit(None, "drop") == fit(length, "drop") == ([("7", FITS)], [])
    assert fit(length - 1, "keep") == ([("7", KEPT)], [])
    assert fit(length - 1, "drop") == ([], ["too long"])
    assert fit(length - 1, "split") == ([("7#1", PART), ("7#2", PART)], [])
    assert fit(10, "split") == ([], ["question and answer too long"] * 2)
    parts, _ = fit_row(row, processor, sizes, max_length=length - 1, too_long="split")
    batch = LlavaDataCollator(processor, max_length=length - 1)([part.row for part in parts])
    images = (batch["input_ids"] == processor.image_token_id).sum(dim=1)
    assert images.tolist() == [16, 16]
    learned = [processor.decode(labels[labels != IGNORED_LABEL]) for labels in batch["labels"]]
    assert learned == [" A circle.</s>", " Red.</s>"]
