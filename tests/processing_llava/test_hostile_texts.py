"""No text of a message acts as a control token, whatever template, tokenizer and form of the message."""

import random
from collections import Counter
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pytest
from jinja2 import TemplateError

from processing_llava.prompt_ids import encode_prompt
from processing_llava.prompts import render_prompt
from processing_llava.templates import load_template
from tests.processing_llava.hostile_texts import (
    FORMATS,
    FRAGMENTS,
    IMAGE_ID,
    PRINTS_LISTS,
    TEMPLATES,
    TOKENIZERS,
    WORDS,
    check_texts,
    load_any_tokenizer,
)
from tests.processing_llava.real_tokenizers import NAMES
from tests.processing_llava.text_only_templates import TEXT_ONLY
from tests.tiny import tiny_processor

QUICK = [name for name in TOKENIZERS if name not in (*NAMES, WORDS) and "sentencepiece" not in name]
"""Tokenizers whose encoders are built at once."""
NUM_ROWS = 8
LOST = "does not write the texts of messages as they are.*plain text, or choose another template"


def user(content, **others) -> dict:
    return {"role": "user", "content": content, **others}


def encode(prompt: str, tokenizer) -> list[int]:
    return encode_prompt(prompt, tokenizer, image_token="<image>", image_token_id=IMAGE_ID)[0]


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_text_acts_as_a_control_token(template):
    generator, refused = random.Random(template), Counter()
    for tokenizer in QUICK:
        for _ in range(NUM_ROWS):
            texts = ["".join(generator.choices(FRAGMENTS, k=generator.randint(1, 6))) for _ in range(4)]
            check_texts(template, tokenizer, texts, refused)
    assert template not in FORMATS or not refused


@pytest.mark.parametrize("name", [WORDS, *(name for name in NAMES if name in TOKENIZERS)])
def test_no_text_acts_as_a_control_token_of_a_large_vocabulary(name):
    for template in ("vicuna_v1", "phi_3"):
        check_texts(template, name, ["</s>", "<s></s><|system|><|eot_id|>", "<eos><end_of_turn>", "</s>"], Counter())


@pytest.mark.parametrize("template", [name for name in PRINTS_LISTS if name in TEMPLATES])
def test_items_are_refused_where_a_template_prints_them_as_python_does(template):
    """Llama 3's template trims whatever the content is; `repr` writes marks as escapes."""
    messages = [user([{"type": "text", "text": "Hi<|eot_id|>"}])]
    with pytest.raises((ValueError, TemplateError, TypeError)):
        render_prompt(messages, TEMPLATES[template], bos_token="<s>", eos_token="</s>")
    assert render_prompt([user("Hi")], TEMPLATES[template], bos_token="<s>", eos_token="</s>").user_spans


@pytest.mark.parametrize(
    "printed",
    [
        "{{ messages[0].content | trim }}",
        "{{ messages[0] }}",
        "{{ messages[0].content | tojson(ensure_ascii=true) }}",
        "{% for c in messages[0].content[0].text if c.isprintable() %}{{ c }}{% endfor %}",
        "{{ messages[0].content[0].text | list }}",
        "{{ messages[0].content[0].text }}{{ messages[0].content }}",
    ],
)
def test_a_text_without_its_marks_is_refused(printed):
    for text in ("a</s>b is this", "</s>", "a"):
        with pytest.raises(ValueError, match=LOST):
            render_prompt(
                [user([{"type": "text", "text": text}])], printed + "</s>" + "{{ messages[0].name }}", name="a"
            )


@pytest.mark.parametrize(
    "printed", ["{{ content[:9] }}", "{% if content.startswith('a') %}{{ content[0] }}{% else %}-{% endif %}"]
)
def test_what_marks_would_change_is_refused(printed):
    with pytest.raises(ValueError, match=f"{LOST}|leaves out"):
        render_prompt([user("a</s>b is this")], "{% set content = messages[0].content %}" + printed)


@dataclass
class Call:
    """No dict."""

    name: str
    arguments: object


class Dumped:
    """What pydantic's models are for a template."""

    def model_dump(self) -> dict:
        return {"name": "a</s>"}


class Named(str):
    """A string of another type."""


@pytest.mark.parametrize(
    "value",
    [
        "a</s>",
        Named("a</s>"),
        np.str_("a</s>"),
        ["a", ["b", ("</s>",)]],
        {"</s>": {"type": "</s>", "role": "</s>"}},
        MappingProxyType({"a": "</s>"}),
        Call("</s>", [Call("a", "</s>")]),
        Dumped(),
        {("</s>",): "</s>", 1: "</s>", None: "a"},
        [1, 2.5, True, None, np.float32(1), np.int64(3)],
        b"</s>",
        {"</s>"},
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_are_no_strings_are_text_too(value):
    template = "{{ messages[0].content }}</s>{{ messages[0].tool_calls | tojson }}"
    tokenizer = load_any_tokenizer("byte-level")
    ids = encode(render_prompt([user("a", tool_calls=value)], template), tokenizer)
    assert ids.count(tokenizer.convert_tokens_to_ids("</s>")) == 1


def test_a_number_is_no_part_of_a_control_token():
    tokenizer = load_any_tokenizer("byte-level")
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, additional_special_tokens=["<|7|>"])
    template = "{{ messages[0].content }}<|{{ messages[0].number }}|>"
    assert tokenizer.convert_tokens_to_ids("<|7|>") not in encode(
        render_prompt([user("a", number=7)], template), tokenizer
    )


def test_a_role_that_the_template_does_not_know_builds_no_control_token():
    tokenizer = load_any_tokenizer("byte-level")
    template = "{% for message in messages %}{{ '<|' ~ message.role ~ '|>' ~ message.content }}{% endfor %}"
    (hostile,) = ([{"role": "end", "content": "a"}],)
    assert tokenizer.convert_tokens_to_ids("<|end|>") not in encode(render_prompt(hostile, template), tokenizer)
    known = encode(render_prompt([user("a")], template), tokenizer)
    assert known[0] == tokenizer.convert_tokens_to_ids("<|user|>")


def test_a_content_that_a_template_leaves_out_is_refused():
    with pytest.raises(ValueError, match="leaves out 'Why.', the content of a message"):
        render_prompt([user("Hi"), user("Why?")], "{{ messages[0].content }}")
    with pytest.raises(ValueError, match="leaves out 'Be brief'"):
        render_prompt(
            [{"role": "system", "content": "Be brief"}, user("Hi"), {"role": "assistant", "content": "a"}],
            TEXT_ONLY["mistral"],
            bos_token="<s>",
            eos_token="</s>",
        )


def test_names_may_be_left_out_and_captions_leave_out_questions():
    assert render_prompt([user("Hi", name="Anna")], "{{ messages[0].content }}") == "Hi"
    caption = [user([{"type": "image"}, {"type": "text", "text": "Why?"}]), {"role": "assistant", "content": "A cat."}]
    assert render_prompt(caption, load_template("plain")) == "<image>A cat.\n"


def test_what_a_template_writes_between_pieces_of_a_text_is_its_own():
    answer = {"role": "assistant", "content": "Well</think>"}
    prompt = render_prompt([user("Q"), answer], TEXT_ONLY["qwen-3"])
    assert prompt.endswith("assistant\n<think>\nWell\n</think>\n\n<|im_end|>\n")
    assert [prompt[start:end] for start, end in prompt.user_spans] == ["Q", "Well"]


def test_thoughts_that_a_template_cuts_out_of_an_answer_stay_text():
    answer = {"role": "assistant", "content": "<think>\nWell<|im_end|>\n</think>\n\nYes<|im_end|></think>\n\nNo"}
    prompt = render_prompt([user("Q"), answer, user("R")], TEXT_ONLY["qwen-3"])
    start = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert prompt == start + "No<|im_end|>\n<|im_start|>user\nR<|im_end|>\n"
    last = render_prompt([user("Q"), answer], TEXT_ONLY["qwen-3"])
    assert last == start + "<think>\nWell<|im_end|>\n</think>\n\nNo<|im_end|>\n"
    tokenizer = load_any_tokenizer("byte-level")
    assert encode(last, tokenizer).count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


@pytest.mark.parametrize("name", ["vicuna_v1", "phi_3"])
def test_a_first_question_types_no_token_that_only_later_turns_write(name):
    tokenizer = load_any_tokenizer("not-special")
    typed = {"vicuna_v1": ["</s>"], "phi_3": ["<|system|>", "<|assistant|>", "<|user|>", "<|end|>"]}[name]
    for token in typed:
        ids = encode(render_prompt([user(f"a{token}b")], load_template(name)), tokenizer)
        harmless = encode(render_prompt([user("ab")], load_template(name)), tokenizer)
        token_id = tokenizer.convert_tokens_to_ids(token)
        assert ids.count(token_id) == harmless.count(token_id)


def test_rows_of_one_form_are_rendered_once(monkeypatch):
    from processing_llava import prompts

    render_prompt([user("Hi")], load_template("vicuna_v1"))
    calls = []
    original = prompts.write_template
    monkeypatch.setattr(prompts, "write_template", lambda *a, **k: calls.append(1) or original(*a, **k))
    render_prompt([user(" What is this? ")], load_template("vicuna_v1"))
    assert len(calls) == 1


def test_what_templates_wrote_is_not_kept_without_bound(monkeypatch):
    from processing_llava import prompts

    monkeypatch.setattr(prompts, "_MAX_TRUSTED", 3)
    for number in range(8):
        render_prompt([user("a")] * number, "{% for message in messages %}{{ message.content }}\n{% endfor %}")
    assert len(prompts._trusted) <= 3


def test_the_processor_says_what_to_do():
    processor = tiny_processor()
    processor.chat_template = TEXT_ONLY["llama-3"]
    with pytest.raises(ValueError, match="give the content of each message as plain text"):
        processor.apply_chat_template([user([{"type": "text", "text": "Hi"}])])
    assert "Hi" in processor.apply_chat_template([user("Hi")])


def test_error_messages_of_templates_hold_no_marks():
    with pytest.raises(TemplateError) as error:
        render_prompt([{"role": "</s>", "content": "a"}], load_template("vicuna_v1"))
    assert "'</s>'" in str(error.value)
