"""Special tokens that the owner of the data names are tokens in answers; everywhere else they are text."""

import json

import pytest

from processing_llava.data.collator import LlavaDataCollator
from processing_llava.data.data_check import ANY, RecordCheck, check_sources
from processing_llava.data.data_sources import DataSource
from processing_llava.data.row_datasets import load_rows
from processing_llava.data.row_lengths import SPELLED
from processing_llava.processing_llava import AnyLlavaProcessor
from processing_llava.prompt_ids import list_special_tokens
from processing_llava.templates import TEMPLATE_FILES
from tests.tiny import tiny_processor

CAPTIONS = ("plain", "v0_plain")
"""Formats that write no questions."""
TOKENS = ["<loc_1>", "<loc_10>", "seg"]


def build_processor(**settings) -> AnyLlavaProcessor:
    processor = tiny_processor(**settings)
    processor.tokenizer.add_tokens(TOKENS, special_tokens=True)
    return processor


def talk(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def count(processor, messages: list[dict]) -> list[int]:
    ids = processor.apply_chat_template(messages, tokenize=True)[0]
    return [ids.count(processor.tokenizer.convert_tokens_to_ids(token)) for token in TOKENS]


@pytest.mark.parametrize("template", [name for name in TEMPLATE_FILES if name not in CAPTIONS])
def test_only_named_tokens_of_answers_count(template):
    processor = build_processor(template=template)
    messages = talk("<loc_1> <loc_10> seg?", "<loc_1> a <loc_10><loc_10> seg </s><image>")
    assert count(processor, messages) == [0, 0, 0]
    processor.learn_tokens = ["<loc_1>", "<loc_10>"]
    assert count(processor, messages) == [1, 2, 0]
    assert count(processor, messages * 2) == [2, 4, 0]
    end = processor.tokenizer.convert_tokens_to_ids("</s>")
    plain = processor.apply_chat_template(talk("a", "b"), tokenize=True)[0]
    assert processor.apply_chat_template(messages, tokenize=True)[0].count(end) == plain.count(end)


def test_a_token_that_ends_in_the_words_of_the_template_is_none():
    processor = build_processor(learn_tokens=["<loc_1>"])
    generation = "{% generation %}{{ m['content'] }}1>{% endgeneration %}"
    processor.chat_template = "{% for m in messages %}" + generation + "{% endfor %}"
    assert count(processor, talk("a", "<loc_")) == [0, 0, 0]


def test_learned_tokens_are_supervised():
    collator = LlavaDataCollator(build_processor(), learn_tokens=["<loc_1>"])
    batch = collator([{"messages": talk("Where? <loc_1>", "At <loc_1>.")}])
    token = collator.processor.tokenizer.convert_tokens_to_ids("<loc_1>")
    assert (batch["labels"] == token).sum() == (batch["input_ids"] == token).sum() == 1


def test_they_are_stored_with_the_processor(tmp_path):
    LlavaDataCollator(build_processor(), learn_tokens=("<loc_1>",)).processor.save_pretrained(tmp_path)
    processor = AnyLlavaProcessor.from_pretrained(tmp_path)
    assert processor.learn_tokens == ["<loc_1>"]
    assert count(processor, talk("<loc_1>", "<loc_1>")) == [1, 0, 0]


@pytest.mark.parametrize("token", ["<loc_2>", "</s>", "<s>", "<pad>", "<image>", 7])
def test_what_cannot_be_learned_is_refused(token):
    for start in (
        lambda: LlavaDataCollator(build_processor(), learn_tokens=[token]),
        lambda: build_processor(learn_tokens=[token]).render(talk("a", "b")),
    ):
        with pytest.raises(ValueError, match="in learn_tokens"):
            start()
    with pytest.raises(ValueError, match="expected a list"):
        LlavaDataCollator(build_processor(), learn_tokens="<loc_1>")


def test_rows_that_spell_tokens_are_counted(tmp_path):
    talks = [talk("a", "b"), talk("<loc_1>", "<loc_1>"), talk("a", "<loc_1>"), talk("a", "seg </s>")]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in talks))
    source = DataSource(path=str(tmp_path / "rows.jsonl"))
    processor = build_processor()
    expected = {ANY: 3, "<loc_1>": 2, "seg": 1, "</s>": 1}
    for learned in ([], ["<loc_1>"]):
        processor.learn_tokens = learned
        report = check_sources([source], RecordCheck(processor), workers=1)
        assert report.spelled == expected and report.to_dict()["spelled_special_tokens"] == expected
        assert "<loc_1>" in report.format_table()
        for measuring in ({}, {"processor": processor}):
            special = list_special_tokens(processor.tokenizer)
            _, fates = load_rows([source], special_tokens=special, learn_tokens=learned, **measuring)
            assert fates[SPELLED] == expected[ANY]
        expected = {ANY: 2, "<loc_1>": 1, "seg": 1, "</s>": 1}
    assert SPELLED not in load_rows([source])[1]
