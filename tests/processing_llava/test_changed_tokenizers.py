"""Whatever changes in a tokenizer after its first prompt counts for the next one, as if it had always been so."""

import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AddedToken

from tests.tiny import tiny_processor

QUESTION = "Is it <loc_1> or kilobase? What  is KILOBASE, a circle, ASSISTANT?\nEND: b"
MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "A red circle <loc_1> kilobase."}]


def add(*tokens: str | AddedToken, special: bool = False):
    return lambda tokenizer: tokenizer.add_tokens(list(tokens), special_tokens=special)


def both(first, second):
    return lambda tokenizer: [change(tokenizer) for change in (first, second)]


def set_piece(name: str, value):
    return lambda tokenizer: setattr(tokenizer.backend_tokenizer, name, value)


def drop_merges(tokenizer) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokenizer.backend_tokenizer.model = models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"][:9]])


def change_vocabulary(tokenizer) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab = model["vocab"] | {"a": model["vocab"]["b"], "b": model["vocab"]["a"]}
    tokenizer.backend_tokenizer.model = models.BPE(vocab, [tuple(pair) for pair in model["merges"]])


def set_model(name: str, value):
    def change(tokenizer) -> None:
        model = tokenizer.backend_tokenizer.model
        setattr(model, name, value)

    return change


def set_special(name: str, value: str):
    return lambda tokenizer: setattr(tokenizer, name, value)


def replace_backend(tokenizer) -> None:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["normalizer"] = {"type": "Lowercase"}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec))


CHANGES = {
    "word": add("kilobase"),
    "word in brackets": add("<loc_1>"),
    "special token": add("<loc_1>", special=True),
    "special word": add("kilobase", special=True),
    "two words": add("kilobase", "circle"),
    "word that strips left": add(AddedToken("kilobase", lstrip=True)),
    "word that strips right": add(AddedToken("kilobase", rstrip=True)),
    "single word": add(AddedToken("circle", single_word=True)),
    "part of words": add(AddedToken("base")),
    "normalised word": both(set_piece("normalizer", normalizers.Lowercase()), add("kilobase")),
    "flags of a word": both(add("kilobase"), add(AddedToken("kilobase", rstrip=True))),
    "word made special": both(add("<loc_1>"), add("<loc_1>", special=True)),
    "special token through its dict": lambda tokenizer: tokenizer.add_special_tokens({"sep_token": "<loc_1>"}),
    "end token": set_special("eos_token", "<pad>"),
    "new end token": lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "END"}),
    "unknown token": set_special("unk_token", "</s>"),
    "begin token": set_special("bos_token", "<pad>"),
    "normalizer": set_piece("normalizer", normalizers.Lowercase()),
    "pre-tokenizer": set_piece("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "merges": drop_merges,
    "vocabulary": change_vocabulary,
    "settings of the model": set_model("ignore_merges", True),
    "whole backend": replace_backend,
}  # fmt: skip


def encode(processor) -> list:
    """Ids of what people wrote, and of the same words written by a template."""
    return [processor.apply_chat_template(MESSAGES, tokenize=True), processor(text=QUESTION)["input_ids"]]


@pytest.mark.parametrize("first", ["nothing", "word", "special token", "normalizer", "merges"])
@pytest.mark.parametrize("second", CHANGES)
def test_a_change_counts_at_once(first, second):
    used, fresh = tiny_processor(), tiny_processor()
    for change in (first, second):
        encode(used)
        for processor in (used, fresh):
            CHANGES.get(change, lambda tokenizer: None)(processor.tokenizer)
    assert encode(used) == encode(fresh)


def test_ids_tell_of_the_changes():
    """The test above would pass for changes that change nothing."""
    before, silent = encode(tiny_processor()), []
    for name, change in CHANGES.items():
        processor = tiny_processor()
        change(processor.tokenizer)
        if encode(processor) == before:
            silent.append(name)
    assert len(silent) <= 3
