"""Every chat template against the prompts of the original LLaVA, byte for byte, and against its own rules."""

import jinja2
import pytest

from processing_llava.prompts import Prompt, render_prompt
from processing_llava.templates import TEMPLATE_FILES, load_template
from tests.processing_llava.golden_prompts import GOLDEN_PROMPTS, golden_messages

# The prompts that the original could render: it raises TypeError on a caption in "plain".
RENDERED = [entry for entry in GOLDEN_PROMPTS["prompts"] if "error" not in entry]
CHAT_NAMES = sorted(set(TEMPLATE_FILES) - {"plain", "v0_plain"})
END_TOKENS = {
    "llava_v0": "###",
    "v0_mmtag": "###",
    "vicuna_v1": "</s>",
    "llava_v1": "</s>",
    "v1_mmtag": "</s>",
    "llama_2": " </s>",
    "llava_llama_2": " </s>",
    "mistral_instruct": " </s>",
    "mpt": "<|im_end|>",
    "chatml_direct": "<|im_end|>",
    "llama_3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "phi_3": "<|end|>",
    "qwen": "<|im_end|>",
}
FILES_WITH_SPACE_BEFORE_ANSWER = {
    *("llava_v0", "v0_mmtag", "vicuna_v1", "llava_v1", "v1_mmtag"),
    *("llama_2", "llava_llama_2", "mistral_instruct"),
}
USER = {"role": "user", "content": "Q"}
ASSISTANT = {"role": "assistant", "content": "A"}


def render(name: str, messages: list[dict], **options) -> Prompt:
    return render_prompt(messages, load_template(name), **options)


def supervised(prompt: Prompt) -> list[str]:
    return [prompt[start:end] for start, end in prompt.assistant_spans]


@pytest.mark.parametrize("entry", RENDERED, ids=lambda entry: f"{entry['template']}-{entry['turns']}-{entry['ask']}")
def test_prompt_equals_the_original(entry):
    messages = golden_messages(entry["turns"], num_images=entry["n_images"], is_open=entry["ask"])
    assert render(entry["template"], messages, add_generation_prompt=entry["ask"]) == entry["prompt"]


def test_every_reference_prompt_but_plain_captions_is_compared():
    left_out = {entry["template"] for entry in GOLDEN_PROMPTS["prompts"] if "error" in entry}
    assert left_out == {"plain", "v0_plain"}
    assert len(RENDERED) == 86


@pytest.mark.parametrize("num_images", [0, 1, 2])
@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("name", CHAT_NAMES)
def test_answers_with_their_end_token_are_supervised(name, turns, num_images):
    file = TEMPLATE_FILES[name]
    prompt = render(name, golden_messages(turns, num_images=num_images, is_open=False))
    space = " " if file in FILES_WITH_SPACE_BEFORE_ANSWER else ""
    assert supervised(prompt) == [f"{space}{answer}{END_TOKENS[file]}" for answer in GOLDEN_PROMPTS["answers"][:turns]]
    assert prompt.count("<image>") == num_images


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_open_prompt_is_the_beginning_of_the_closed_one(name):
    asked = render(name, golden_messages(2, num_images=1, is_open=True), add_generation_prompt=True)
    closed = render(name, golden_messages(2, num_images=1, is_open=False))
    assert closed.startswith(asked)
    assert closed.assistant_spans[-1][0] == len(asked)


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_user_spans_cover_exactly_what_messages_say(name):
    prompt = render(name, [{"role": "user", "content": " What? "}, {"role": "assistant", "content": "A\nB"}])
    assert [prompt[start:end] for start, end in prompt.user_spans] == ["What?", "A\nB"]


@pytest.mark.parametrize("num_images", [1, 2])
def test_plain_keeps_images_and_caption(num_images):
    prompt = render("plain", golden_messages(1, num_images=num_images, is_open=False))
    assert prompt == "<image>" * num_images + "A small object on a table.\n"
    assert supervised(prompt) == ["A small object on a table.\n"]


def test_plain_refuses_a_caption_without_image():
    with pytest.raises(jinja2.TemplateError, match="without image"):
        render("plain", [USER, ASSISTANT])


def test_plain_refuses_conversations():
    with pytest.raises(jinja2.TemplateError, match="3 turns"):
        render("plain", [USER, ASSISTANT, USER])


IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "Why?"}


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ([IMAGE], "<image>"),
        ([IMAGE, {"type": "text", "text": ""}], "<image>"),
        ([IMAGE, TEXT], "<image>\nWhy?"),
        ([IMAGE, IMAGE, TEXT], "<image>\n<image>\nWhy?"),
        ([TEXT, IMAGE], "Why?<image>"),
        ([IMAGE, TEXT, IMAGE, TEXT], "<image>\nWhy?<image>Why?"),
        ([{"type": "image", "text": None}, {"type": "text", "text": "Why?"}], "<image>\nWhy?"),
    ],
)
def test_leading_images_take_a_line_each(content, written):
    assert render("mistral_instruct", [{"role": "user", "content": content}]) == f"[INST] {written} [/INST]"


def test_start_and_end_tokens_surround_images():
    template = load_template("llava_v1", image="<im_start><image><im_end>")
    prompt = render_prompt(golden_messages(1, num_images=1, is_open=True), template)
    assert "USER: <im_start><image><im_end>\nWhat is" in prompt


@pytest.mark.parametrize("name", sorted(set(CHAT_NAMES) - {"gemma", "gemma_instruct"}))
def test_system_message_replaces_the_default(name):
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    default, prompt = render(name, [USER]), render(name, [system, USER])
    assert "Be brief." in prompt
    for text in ("polite answers", "helpful", "natural language", "Answer the questions."):
        assert text not in prompt
    assert prompt.endswith(default[-4:])


def test_gemma_refuses_a_system_message():
    with pytest.raises(jinja2.TemplateError, match="system message"):
        render("gemma", [{"role": "system", "content": "Be brief."}, USER])


@pytest.mark.parametrize("name", sorted(TEMPLATE_FILES))
@pytest.mark.parametrize(
    "messages",
    [[USER, USER], [ASSISTANT], [USER, ASSISTANT, ASSISTANT], [USER, {"role": "tool", "content": "1"}]],
    ids=["two-users", "assistant-first", "two-assistants", "unknown-role"],
)
def test_other_orders_are_refused(name, messages):
    with pytest.raises(jinja2.TemplateError, match="expected '(user|assistant)'"):
        render(name, messages)


def test_generation_prompt_after_an_answer_is_refused():
    with pytest.raises(jinja2.TemplateError, match="without a user message at the end"):
        render("vicuna_v1", [USER, ASSISTANT], add_generation_prompt=True)


def test_unknown_content_type_is_refused():
    with pytest.raises(jinja2.TemplateError, match="type 'video'"):
        render("vicuna_v1", [{"role": "user", "content": [{"type": "video"}]}])


def test_unknown_format_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'vicuna'; expected one of .*vicuna_v1"):
        load_template("vicuna")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "llama_3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n<image>\nQ<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nR<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "qwen",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<image>\nQ<|im_end|>\n<|im_start|>assistant\n"
            "A<|im_end|>\n<|im_start|>user\n R<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "phi_3",
            "<|system|>\nS<|end|>\n<|user|>\n<image>\nQ<|end|>\n<|assistant|>\nA<|end|>\n<|user|>\n R<|end|>\n"
            "<|assistant|>\n",
        ),
    ],
)
def test_formats_of_later_language_models(name, expected):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "Q"}]},
        ASSISTANT,
        {"role": "user", "content": " R"},
    ]
    assert render(name, messages, add_generation_prompt=True) == expected


def test_gemma_format():
    expected = "<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n<start_of_turn>user\nQ"
    asked = render("gemma", [USER, ASSISTANT, USER], add_generation_prompt=True)
    assert asked == expected + "<end_of_turn>\n<start_of_turn>model\n"
