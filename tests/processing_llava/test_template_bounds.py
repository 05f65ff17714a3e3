"""Chat templates of strangers cost little, and those of everybody else write what they always wrote."""

import copy
import json
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from importlib.resources import files
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import Regex, pre_tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from processing_llava.prompt_ids import encode_prompt
from processing_llava.prompts import render_prompt
from processing_llava.template_bounds import CostlyTemplateError, compile_template, write_template
from tests.processing_llava.hostile_templates import ALMOST, HOSTILE, WRITE
from tests.processing_llava.hostile_texts import IMAGE_ID, TEMPLATES
from tests.processing_llava.tokenizers_of_each_kind import load_tokenizer
from tests.tiny import tiny_processor

MAX_SECONDS, MAX_BYTES = 2.0, 300 * 2**20
PUBLISHED = TEMPLATES | {
    path.name: path.read_text()
    for path in files("trl").joinpath("chat_templates").iterdir()
    if path.suffix == ".jinja"
}
"""Ours, those of the tests, and those that TRL brings: of Llama 3, Gemma 3 and 4, Qwen 2.5 to 3.8, and others."""
THOUGHT = "<think>\nhm\n</think>\n\nThat <b>."
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get", "arguments": {"city": "Paris", "n": 3}}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi <b>"}],
    [
        {"role": "system", "content": "S"},
        {"role": "user", "content": " a "},
        {"role": "assistant", "content": THOUGHT},
    ],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "get", "tool_call_id": "abcdefghi", "content": "sunny"},
    ],
]
CITY = {"type": "string", "description": "of <any>", "enum": ["a", "b"]}
PARAMETERS = {"type": "object", "properties": {"city": CITY, "n": {"type": ["integer", "null"]}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get", "description": "gets", "parameters": PARAMETERS}}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def run_templates(names: list[str]) -> list[dict[str, Any]]:
    """What became of each, in a process of its own."""
    worker = [sys.executable, "-m", "tests.processing_llava.hostile_templates"]
    result = subprocess.run(worker, input=json.dumps(names), capture_output=True, text=True, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_hostile_templates_are_refused_in_one_line_and_others_cost_little():
    faults = []
    for found in run_templates([*HOSTILE, *ALMOST]):
        result = found["result"]
        is_line = result.startswith(("ValueError: got ", "CostlyTemplateError: got ")) and "\n" not in result
        if found["name"] in HOSTILE and not (is_line and "the chat template" in result and len(result) < 600):
            faults.append((found["name"], result))
        if found["seconds"] > MAX_SECONDS or found["bytes"] > MAX_BYTES:
            faults.append((found["name"], found["seconds"], found["bytes"]))
    assert faults == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_write_what_they_wrote(name):
    """Without the names of thoughts, of which versions of transformers know others."""
    written = 0
    for messages in CONVERSATIONS:
        for tools in (None, [TOOL]):
            for add_generation_prompt in (False, True):
                variables = {"tools": tools, "add_generation_prompt": add_generation_prompt, **TOKENS}
                theirs = partial(render_jinja_template, [messages], chat_template=PUBLISHED[name], **variables)
                ours = {"messages": messages, "documents": None, **variables}
                try:
                    (expected,), spans = theirs(return_assistant_tokens_mask="{% generation %}" in PUBLISHED[name])
                except Exception:
                    with pytest.raises(Exception) as refused:
                        write_template(PUBLISHED[name], ours)
                    assert refused.type is not CostlyTemplateError
                    continue
                text, found = write_template(PUBLISHED[name], ours)
                assert text == expected
                assert not spans or list(map(tuple, spans[0])) == found
                written += 1
    assert written


@pytest.mark.parametrize("name", PUBLISHED)
def test_long_conversations_are_written(name):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "b"}] * 150
    long = [{"role": "user", "content": "How are you? " * 3000}, {"role": "assistant", "content": "Fine. " * 3000}]
    for messages in (turns, long):
        # Some know items alone, or one question.
        with suppress(TemplateError):
            write_template(PUBLISHED[name], {"messages": messages, "tools": None, **TOKENS})


@pytest.mark.parametrize("content", ["Sure", [{"type": "text", "text": "Sure "}], " Sure "])
@pytest.mark.parametrize("name", ["chatml_direct", "llama_3"])
def test_the_last_message_goes_on_as_with_transformers(name, content):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    options = {"continue_final_message": True, **TOKENS}
    (expected,), _ = render_jinja_template([messages], chat_template=TEMPLATES[name], **options)
    assert render_prompt(messages, TEMPLATES[name], **options) == expected


def test_a_template_that_leaves_the_last_message_out_is_refused():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure"}]
    template = "{% for m in messages %}{{ m.content if m.role == 'user' else m.content[:2] }}{% endfor %}"
    with pytest.raises(ValueError, match="does not write the whole last message"):
        render_prompt(messages, template, continue_final_message=True)


def test_bounds_cost_less_than_a_millisecond():
    """A prompt of a question, as a server renders it; medians, since other processes run beside."""
    given = {"messages": CONVERSATIONS[2], "tools": None, "add_generation_prompt": True, **TOKENS}

    def time_it(call) -> float:
        seconds = []
        for _ in range(15):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return sorted(seconds)[7]

    for template in (template for name, template in TEMPLATES.items() if name != "plain"):
        theirs = partial(render_jinja_template, [CONVERSATIONS[2]], chat_template=template, **given)
        theirs.keywords.pop("messages")
        assert time_it(partial(write_template, template, given)) - time_it(theirs) < 0.001


def test_a_processor_names_no_file_where_there_is_none():
    processor = tiny_processor()
    with pytest.raises(ValueError, match=r"^got the chat template, which takes more than [\d,]+ steps; expected one"):
        processor.apply_chat_template(
            [{"role": "user", "content": "Hi"}], chat_template="{{ 'a' * 10**9 }}" + WRITE, tokenize=True
        )


def test_a_template_is_compiled_once():
    assert compile_template(WRITE) is compile_template(WRITE)


def test_panics_of_tokenizers_are_errors():
    tokenizer = copy.deepcopy(load_tokenizer("not-special"))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+[^a]"), "isolated")
    with pytest.raises(ValueError, match=r"^got a tokenizer whose rules fail \(.*retry-limit.*; expected a whole"):
        encode_prompt("a" * 60, tokenizer, image_token="<image>", image_token_id=IMAGE_ID)
