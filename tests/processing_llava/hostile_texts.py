"""Conversations whose texts hold control tokens, for every template and tokenizer; used by `tests.fuzz texts`, too."""

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from processing_llava.prompt_ids import encode_prompt
from processing_llava.prompts import Prompt, render_prompt
from processing_llava.templates import TEMPLATE_FILES, load_template
from tests.processing_llava.real_tokenizers import FOLDER, NAMES, load_real_tokenizer
from tests.processing_llava.text_only_templates import TEXT_ONLY, read_published
from tests.processing_llava.tokenizers_of_each_kind import CONTROL_TOKENS, KINDS, load_sentencepiece, load_tokenizer

IMAGE_ID = 10**6
FORMATS = sorted(set(TEMPLATE_FILES.values()))
TEMPLATES = {name: load_template(name) for name in FORMATS} | TEXT_ONLY | read_published()
WORDS = "sentencepiece-words"
"""A SentencePiece vocabulary to which all control tokens were added as words, as Gemma 3 has "</s>"."""
TOKENIZERS = (*KINDS, WORDS, *(name for name in NAMES if (FOLDER / name).is_dir()))
PRINTS_LISTS = ("llama-3", "llama3, published", "qwen-3", "qwen3, published", "mistral")
"""Templates that know no items."""

FRAGMENTS = (
    *CONTROL_TOKENS,
    *("###", "USER:", "<think>", "</think>", "<tool_call>", "<tool_response>", "<|eot_id|>", "<eos>", "<bos>"),
    *("\ue000", "\ue001", "\uf8ff", "\U000f0000", "\\ue000", "<", ">", "<|", "|>", "</", "s>", " ", "\n", "'", '"'),
)
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), min_size=1, max_size=8).map("".join)


@dataclass
class Call:
    """A tool call as other software has it: no dict."""

    name: str
    arguments: Any


@cache
def load_any_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One of `TOKENIZERS`."""
    if name in KINDS:
        return load_tokenizer(name)
    if name == WORDS:
        tokenizer = copy.deepcopy(load_sentencepiece(legacy=False))
        tokenizer.add_tokens([token for token in CONTROL_TOKENS if token not in ("<s>", "</s>")])
        return tokenizer
    return load_real_tokenizer(name)


def build_conversations(name: str, texts: list[str]) -> Iterator[list[dict[str, Any]]]:
    """What a stranger may send to a template: texts in contents and items, then in everything else, too."""
    system, question, answer, other = texts
    items = [{"type": "image"}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": items}, {"role": "assistant", "content": answer}]
    if name == "plain":
        yield turns
        return
    if name in FORMATS:
        yield turns[:1]
        yield [*([] if name == "gemma" else [{"role": "system", "content": system}]), *turns]
        return
    plain = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    yield plain[:1]
    yield [*plain, {"role": "user", "content": other}]
    yield turns
    call = Call(other, {system: [other, {"type": answer, "n": 7}], "b": (question,)})
    yield [
        {**plain[0], "name": other, other: system},
        {**plain[1], "tool_calls": [call, {"function": call, "id": other}]},
    ]


def find_control_ids(prompt: Prompt, template: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids of a prompt that act: those of images, of special tokens, and of tokens that the template writes."""
    written = "".join([template, *(prompt[start:end] for start, end in find_gaps(prompt))])
    acting = {
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content in written and not set("<>[]|").isdisjoint(token.content))
    }
    ids, _ = encode_prompt(
        prompt,
        tokenizer,
        image_token="<image>",
        image_token_id=IMAGE_ID,
        num_image_tokens=[1] * sum(prompt.count("<image>", start, end) for start, end in find_gaps(prompt)),
    )
    return [token_id for token_id in ids if token_id in acting | {IMAGE_ID} and token_id != tokenizer.unk_token_id]


def find_gaps(prompt: Prompt) -> Iterator[tuple[int, int]]:
    """The ranges that no user wrote."""
    ends = [0, *(end for _, end in prompt.user_spans)]
    return zip(ends, [*(start for start, _ in prompt.user_spans), len(prompt)])


@cache
def find_harmless_ids(template_name: str, tokenizer_name: str, are_blank: tuple[bool, ...]) -> list[list[int]]:
    """What acts in the same conversations about nothing; empty where a template refuses them."""
    texts = ["" if is_blank else text for is_blank, text in zip(are_blank, "abcd")]
    return list(_find_ids(template_name, tokenizer_name, texts, Counter()))


def _find_ids(template_name: str, tokenizer_name: str, texts: list[str], refused: Counter[str]) -> Iterator[list[int]]:
    template, tokenizer = TEMPLATES[template_name], load_any_tokenizer(tokenizer_name)
    variables = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    for messages in build_conversations(template_name, texts):
        try:
            prompt = render_prompt(messages, template, **{"bos_token": "", "eos_token": ""} | variables)
        except (TemplateError, TypeError, ValueError):
            refused[template_name] += 1
            yield []
            continue
        yield find_control_ids(prompt, template, tokenizer)


def check_texts(template_name: str, tokenizer_name: str, texts: list[str], refused: Counter[str]) -> None:
    """Fails if a text adds, takes or changes an id that acts. What is refused is counted."""
    found = list(_find_ids(template_name, tokenizer_name, texts, refused))
    harmless_ids = find_harmless_ids(template_name, tokenizer_name, tuple(not text.strip() for text in texts))
    for number, (ids, harmless) in enumerate(zip(found, harmless_ids)):
        if ids:
            assert ids == harmless, (template_name, tokenizer_name, number, texts)
