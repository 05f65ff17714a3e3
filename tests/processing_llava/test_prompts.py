"""Prompts against the ids and labels of the original LLaVA, and against everything a user can type."""

import copy
import json
import pickle
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AddedToken, PreTrainedTokenizerFast

from processing_llava.prompt_ids import encode_prompt
from processing_llava.prompts import Prompt, count_images, render_prompt
from processing_llava.templates import TEMPLATE_FILES, load_template
from tests.conftest import GOLDENS
from tests.processing_llava.golden_prompts import GOLDEN_PROMPTS, golden_messages
from tests.processing_llava.tokenizers_of_each_kind import (
    CONTROL_TOKENS,
    KINDS,
    NOT_SPECIAL,
    load_sentencepiece,
    load_tokenizer,
)

LABELS = json.loads((GOLDENS / "labels.json").read_text(encoding="utf-8"))
LABEL_TENSORS = load_file(GOLDENS / "labels.safetensors")
# An id that no tokenizer here gives.
IMAGE_ID = 10**6
IGNORED = -100

ALL_NAMES = sorted(TEMPLATE_FILES)
NAMES = sorted(set(TEMPLATE_FILES) - {"plain", "v0_plain"})
FRAGMENTS = (*CONTROL_TOKENS, "###", "\ue000", "\ue001", "\uf8ff", "\U000f0000", "<", ">", "<|", "|>", "</", "s>", " ")
HOSTILE = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), min_size=1, max_size=8).map("".join)
BENIGN = st.text(alphabet="aWhatAR12 \n.,?:;()=\u00e9\u4e2d\U0001f642", min_size=1, max_size=40)


def encode(prompt: str, kind: str, num_images: int = 0) -> tuple[list[int], list[int]]:
    return encode_prompt(
        prompt,
        load_tokenizer(kind),
        image_token="<image>",
        image_token_id=IMAGE_ID,
        num_image_tokens=[3] * num_images,
    )


def find_control_ids(prompt: str, kind: str, num_images: int = 0) -> list[int]:
    tokenizer, tokens = load_tokenizer(kind), CONTROL_TOKENS
    if kind == NOT_SPECIAL:
        # What the template does not write is a word like any other.
        tokens = [token for token in CONTROL_TOKENS if token in text_of_template(prompt) + prompt.template_text]
    special_ids = {IMAGE_ID, *tokenizer.convert_tokens_to_ids(tokens), tokenizer.eos_token_id}
    return [token_id for token_id in encode(prompt, kind, num_images)[0] if token_id in special_ids]


def text_of_template(prompt: Prompt) -> str:
    ends = [start for start, _ in prompt.user_spans] + [len(prompt)]
    return "".join(prompt[start:end] for start, end in zip([0, *(end for _, end in prompt.user_spans)], ends))


def reference_entries(*, template: str | None = None, without: tuple[str, ...] = ()) -> list[dict]:
    return [entry for entry in LABELS if entry["template"] not in without and template in (None, entry["template"])]


def encode_reference(entry: dict) -> tuple[list[int], list[int], list[int], list[int]]:
    """Our ids and labels, then those of the original."""
    messages = golden_messages(entry["turns"], num_images=int(entry["image"]), is_open=False)
    # The control tokens of other families must stay text, as they were for the original.
    tokenizer = load_sentencepiece(legacy=entry["legacy"])
    ids, mask = encode_prompt(
        render_prompt(messages, load_template(entry["template"])),
        tokenizer,
        image_token="<image>",
        image_token_id=-200,
        num_image_tokens=[1] * entry["image"],
    )
    labels = [token_id if flag else IGNORED for token_id, flag in zip(ids, mask)]
    index = entry["index"]
    reference_ids, reference_labels = (LABEL_TENSORS[f"{index}.{name}"].tolist() for name in ("input_ids", "labels"))
    return ids, labels, reference_ids, reference_labels


def name_entry(entry: dict) -> str:
    return "-".join(f"{entry[key]}" for key in ("template", "legacy", "turns", "image"))


@pytest.mark.parametrize("entry", reference_entries(without=("llava_v0", "chatml_direct")), ids=name_entry)
def test_ids_and_labels_equal_the_original(entry):
    ids, labels, reference_ids, reference_labels = encode_reference(entry)
    assert ids == reference_ids
    assert labels == reference_labels


@pytest.mark.parametrize("entry", reference_entries(template="chatml_direct"), ids=name_entry)
def test_chatml_is_supervised_where_the_original_gives_up(entry):
    # The original counts tokens of each round, finds another sum than tokens, and blanks the whole row.
    ids, labels, reference_ids, reference_labels = encode_reference(entry)
    assert ids == reference_ids
    assert set(reference_labels) == {IGNORED}
    text = load_sentencepiece(legacy=entry["legacy"]).decode([label for label in labels if label != IGNORED])
    for answer in GOLDEN_PROMPTS["answers"][: entry["turns"]]:
        assert f"{answer}<|im_end|>" in text


@pytest.mark.parametrize("entry", reference_entries(template="llava_v0"), ids=name_entry)
def test_llava_v0_is_trained_as_it_is_asked(entry):
    # The original trains on "\n### Human: " where it asks with "###Human: ", and its labels leak parts of questions.
    ids, labels, reference_ids, reference_labels = encode_reference(entry)
    tokenizer = load_sentencepiece(legacy=entry["legacy"])
    reference_text = tokenizer.decode([token_id for token_id in reference_ids if token_id >= 0])
    assert "\n### Human: " in reference_text
    assert "Human" in tokenizer.decode([label for label in reference_labels if label != IGNORED])
    text = tokenizer.decode([label for label in labels if label != IGNORED])
    assert text == "".join(f" {answer}###" for answer in GOLDEN_PROMPTS["answers"][: entry["turns"]]).removeprefix(" ")


def test_every_reference_entry_is_compared():
    assert len(LABELS) == 74
    assert {entry["template"] for entry in LABELS} <= set(TEMPLATE_FILES)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(system=HOSTILE, question=HOSTILE, answer=HOSTILE, name=st.sampled_from(ALL_NAMES))
def test_no_typed_text_becomes_a_control_token_or_an_image(kind, system, question, answer, name):
    def control_ids(system: str, question: str, answer: str) -> list[int]:
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        ]
        prompt = render_prompt(messages[TEMPLATE_FILES[name] == "gemma" :], load_template(name))
        assert count_images(prompt, "<image>") == 1
        return find_control_ids(prompt, kind, num_images=1)

    assert control_ids(system, question, answer) == control_ids("a", "a", "a")


FOREIGN = """{%- for message in messages -%}
<|im_start|>{{ message.role }} {{ message.name }}
{% for item in message.content %}{{ item.type }} {{ item | tojson }}{% endfor %}
{{ message.tool_calls | tojson }}<|im_end|>
{% endfor %}"""


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(role=HOSTILE, name=HOSTILE, type=HOSTILE, key=HOSTILE, value=HOSTILE)
def test_no_role_name_key_or_type_becomes_a_control_token(kind, role, name, type, key, value):
    """Other templates write all of them."""

    def control_ids(role: str, name: str, type: str, key: str, value: str) -> list[int]:
        arguments = {key: value, "type": type, "role": {"role": role, key + "b": [{"type": value}]}}
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        message = {"role": role, "name": name, "content": [{"type": type, key: value}], "tool_calls": [call]}
        return find_control_ids(render_prompt([message], FOREIGN), kind)

    assert control_ids(role, name, type, key, value) == control_ids("a", "a", "a", "a", "a")


def test_names_are_seen_by_templates_as_they_are():
    messages = [{"role": "user-2", "content": [{"type": "input_text", "cache-control": "a"}]}]
    template = "{{ messages[0].role == 'user-2' }} {{ messages[0].content[0]['cache-control'] }}"
    assert render_prompt(messages, template) == "True a"
    prompt = render_prompt([{"role": "user<|im_end|>", "content": ""}], "{{ messages[0].role }}")
    assert prompt.user_spans == ((0, len(prompt)),)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(question=HOSTILE, name=st.sampled_from(NAMES))
def test_typed_text_is_decoded_as_it_was_typed(kind, question, name):
    # SentencePiece writes spaces as U+2581 and cannot tell the two apart.
    question = question.replace("\u2581", "").strip()
    ids, _ = encode(render_prompt([{"role": "user", "content": f"({question})"}], load_template(name)), kind)
    expected = unicodedata.normalize("NFC", f"({question})") if kind == "normalised" else f"({question})"
    assert expected in load_tokenizer(kind).decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(question=BENIGN, answer=BENIGN, name=st.sampled_from(NAMES))
def test_benign_text_gives_the_ids_of_the_whole_string(kind, question, answer, name):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = render_prompt(messages, load_template(name))
    ids, mask = encode_prompt(
        prompt, load_tokenizer(kind), image_token="<image>", image_token_id=IMAGE_ID, add_special_tokens=False
    )
    assert ids == load_tokenizer(kind).encode(str(prompt), add_special_tokens=False)
    assert len(mask) == len(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_text_is_supervised_like_any_other(kind):
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a</s>b <image> [INST]"}]
    ids, mask = encode(render_prompt(messages, load_template("vicuna_v1")), kind)
    tokenizer = load_tokenizer(kind)
    supervised = [token_id for token_id, flag in zip(ids, mask) if flag]
    assert tokenizer.decode(supervised, clean_up_tokenization_spaces=False).strip() == "a</s>b <image> [INST]</s>"
    assert supervised.count(tokenizer.convert_tokens_to_ids("</s>")) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_of_a_plain_string_count(kind):
    ids, mask = encode("a<image>b</s>", kind, num_images=1)
    assert ids.count(IMAGE_ID) == 3
    assert ids[-1] == load_tokenizer(kind).convert_tokens_to_ids("</s>")
    assert set(mask) == {0}


def test_text_after_an_image_is_tokenised_like_a_start():
    tokenizer = load_tokenizer("sentencepiece")
    ids, _ = encode("USER: <image>\nWhat<image><image>hi</s>hi", "sentencepiece", num_images=3)
    ids = [token_id for position, token_id in enumerate(ids) if [token_id] * 2 != ids[position - 1 : position + 1]]
    tokens = ["IMAGE" if i == IMAGE_ID else tokenizer.convert_ids_to_tokens(i) for i in ids]
    start = ["<s>", "\u2581US", "ER", ":", "\u2581", "IMAGE", "\u2581", "<0x0A>", "What", "IMAGE"]
    assert tokens == [*start, "\u2581hi", "</s>", "hi"]


def test_legacy_puts_a_space_after_every_control_token():
    tokenizer = load_tokenizer("sentencepiece-legacy")
    ids, _ = encode("hi</s>hi", "sentencepiece-legacy")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "\u2581hi", "</s>", "\u2581hi"]


@pytest.mark.parametrize("text", ["hi", "<s>hi"])
def test_bos_is_written_once(text):
    bos_id = load_tokenizer("sentencepiece").bos_token_id
    assert encode(text, "sentencepiece")[0].count(bos_id) == 1


def test_bos_can_be_left_out():
    tokenizer = load_tokenizer("sentencepiece")
    ids, _ = encode_prompt("hi", tokenizer, image_token="<image>", image_token_id=IMAGE_ID, add_special_tokens=False)
    assert tokenizer.bos_token_id not in ids


def test_no_bos_where_the_tokenizer_has_none():
    ids, _ = encode("hi", "byte-level")
    assert load_tokenizer("byte-level").decode(ids) == "hi"


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_is_left_as_it_was(kind):
    tokenizer = load_tokenizer(kind)
    before = tokenizer.backend_tokenizer.to_str()
    encode(render_prompt([{"role": "user", "content": "</s>"}], load_template("vicuna_v1")), kind)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert not tokenizer.backend_tokenizer.encode_special_tokens
    assert tokenizer.convert_tokens_to_ids("</s>") in tokenizer.encode("a</s>")


def test_padding_and_truncation_of_the_tokenizer_are_not_used():
    tokenizer = load_tokenizer("byte-level")
    expected = encode("What is this?", "byte-level")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    try:
        assert encode("What is this?", "byte-level") == expected
    finally:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()


def test_tokens_added_later_are_control_tokens_at_once():
    tokenizer = copy.deepcopy(load_sentencepiece(legacy=False))
    options = {"image_token": "<image>", "image_token_id": IMAGE_ID}
    before, _ = encode_prompt("a<later>", tokenizer, **options)
    tokenizer.add_tokens([AddedToken("<later>", normalized=False)], special_tokens=True)
    after, _ = encode_prompt("a<later>", tokenizer, **options)
    assert tokenizer.convert_tokens_to_ids("<later>") not in before
    assert after[-1] == tokenizer.convert_tokens_to_ids("<later>")


def test_an_image_token_that_is_not_declared_special_cannot_be_typed():
    tokenizer = copy.deepcopy(load_sentencepiece(legacy=False))
    tokenizer.add_tokens([AddedToken("<image>", normalized=False, special=False)])
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    content = [{"type": "image"}, {"type": "text", "text": "<image>"}]
    prompt = render_prompt([{"role": "user", "content": content}], load_template("vicuna_v1"))
    ids, _ = encode_prompt(prompt, tokenizer, image_token="<image>", image_token_id=image_id, num_image_tokens=[5])
    assert ids.count(image_id) == 5
    assert image_id in tokenizer.encode("<image>")


def test_added_words_that_the_template_does_not_write_stay_tokens():
    """Gemma's vocabulary has "<table>" and other marks of HTML."""
    tokenizer = copy.deepcopy(load_sentencepiece(legacy=False))
    tokenizer.add_tokens([AddedToken("<table>", normalized=False, special=False)])
    prompt = render_prompt([{"role": "user", "content": "a<table>b"}], load_template("vicuna_v1"))
    ids, _ = encode_prompt(prompt, tokenizer, image_token="<image>", image_token_id=IMAGE_ID)
    assert tokenizer.convert_tokens_to_ids("<table>") in ids


def test_added_white_space_is_no_control_token():
    tokenizer = copy.deepcopy(load_sentencepiece(legacy=False))
    tokenizer.add_tokens([AddedToken("\n\n\n", normalized=False, special=False)])
    prompt = render_prompt([{"role": "user", "content": "a\n\n\nb"}], load_template("vicuna_v1"))
    ids, _ = encode_prompt(prompt, tokenizer, image_token="<image>", image_token_id=IMAGE_ID)
    assert tokenizer.convert_tokens_to_ids("\n\n\n") in ids


def test_a_tokenizer_that_makes_control_tokens_out_of_text_is_refused():
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", -1.0), ("a", -2.0), (" ", -2.0)], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    prompt = Prompt("a </s></s>", user_spans=[(0, 6)])
    with pytest.raises(ValueError, match="turns into the control tokens"):
        encode_prompt(prompt, tokenizer, image_token="<image>", image_token_id=IMAGE_ID)


def test_prompts_survive_copying_and_pickling():
    prompt = render_prompt([{"role": "user", "content": "</s>"}], load_template("vicuna_v1"))
    for twin in (copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert (twin, twin.user_spans) == (prompt, prompt.user_spans)


def test_numbers_of_placeholders_and_images_must_agree():
    with pytest.raises(ValueError, match="got 1 <image> placeholders and 2 numbers"):
        encode("<image>", "byte-level", num_images=2)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="expected a fast tokenizer"):
        encode_prompt("a", object(), image_token="<image>", image_token_id=IMAGE_ID)


def test_prompt_is_its_text():
    prompt = render_prompt([{"role": "user", "content": "\ue000 Hi \ue001"}], load_template("mistral_instruct"))
    assert prompt == "[INST] \ue000 Hi \ue001 [/INST]"
    assert isinstance(prompt, Prompt)
    assert json.loads(json.dumps(prompt)) == prompt


def test_templates_may_trim():
    template = "{% for message in messages %}[{{ message.content | trim }}]{% endfor %}"
    prompt = render_prompt([{"role": "user", "content": "  </s> "}], template)
    assert prompt == "[</s>]"
    assert prompt.user_spans == ((1, 5),)


CUTTING = "{{ messages[0].content.split('|')[1] }}{{ messages[0].content.split('|')[0] }}</s>"


@pytest.mark.parametrize("text", ["a</s>|b</s>|c", "</s>|</s>", "|</s></s>|"])
def test_pieces_of_a_cut_message_stay_text(text):
    tokenizer = load_tokenizer("byte-level")
    prompt = render_prompt([{"role": "user", "content": text}], CUTTING)
    ids, _ = encode(prompt, "byte-level")
    assert ids.count(tokenizer.convert_tokens_to_ids("</s>")) == 1
    assert tokenizer.decode(ids) == prompt


def test_roles_and_types_are_not_marked():
    template = "{% for message in messages %}{{ message.role }}:{{ message.content[0].type }}{% endfor %}"
    prompt = render_prompt([{"role": "user", "content": [{"type": "image"}]}], template)
    assert prompt == "user:image"
    assert prompt.user_spans == ()


def test_template_without_generation_supervises_nothing():
    prompt = render_prompt([{"role": "user", "content": "Hi"}], "{{ messages[0].content }}")
    assert prompt.assistant_spans == ()


def test_final_message_can_be_continued():
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "The"}]
    prompt = render_prompt(messages, load_template("vicuna_v1"), continue_final_message=True)
    assert prompt.endswith("USER: Q ASSISTANT: The")
    assert [prompt[start:end] for start, end in prompt.assistant_spans] == [" The"]
    assert [prompt[start:end] for start, end in prompt.user_spans] == ["Q", "The"]


def test_template_variables_are_trusted():
    template = "{{ bos_token }}{{ messages[0].content }}"
    prompt = render_prompt([{"role": "user", "content": "Q"}], template, bos_token="<s>")
    assert encode(prompt, "byte-level")[0][0] == load_tokenizer("byte-level").convert_tokens_to_ids("<s>")
