"""Tokenizers and chat templates as strangers might put them into a folder; a part of `hostile_folders.py`."""

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.modeling_llava.checkpoints.folder_changes import MIB, change_json, nest, replace


def normalize(*parts: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder, "tokenizer.json", normalizer=chain("normalizers", parts))


def cut(*parts: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder, "tokenizer.json", pre_tokenizer=chain("pretokenizers", parts))


def finish(*parts: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder, "tokenizer.json", post_processor=chain("processors", parts))


def decode(*parts: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder, "tokenizer.json", decoder=chain("decoders", parts))


def chain(inner: str, parts: tuple[Any, ...]) -> Any:
    return parts[0] if len(parts) == 1 else {"type": "Sequence", inner: list(parts)}


def swap(pattern: str, content: str, *, form: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {form: pattern}, "content": content}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def precompile(data: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def frame(*ids: int, copies: int = 1) -> dict[str, Any]:
    token = {"id": "a", "ids": list(ids), "tokens": ["a"] * len(ids)}
    text = [{"Sequence": {"id": "A", "type_id": 0}}] * copies
    single = [{"SpecialToken": {"id": "a", "type_id": 0}}, *text]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {"a": token}}


def add_token(folder: Path, content: str) -> None:
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    fields["added_tokens"].append({"id": 10**6, "content": content, **flags})
    path.write_text(json.dumps(fields))


def change_model(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] |= fields
    path.write_text(json.dumps(content))


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TOKENIZER_CHANGES: dict[str, Callable[[Path], None]] = {
    "a normalizer that multiplies": normalize(*[swap("a", "a" * 200)] * 3),
    "a normalizer that multiplies by patterns": normalize(*[swap(".", "aaaa", form="Regex")] * 6),
    "a normalizer that multiplies what is between": normalize(swap("", "a" * 500)),
    "a normalizer that puts 50 MB before": normalize({"type": "Prepend", "prepend": "a" * (50 * MIB)}),
    "a normalizer that puts much before": normalize({"type": "Prepend", "prepend": "a" * 900}),
    "a normalizer of normalizers": normalize(*[chain("normalizers", (swap("a", "aaa"),) * 3)] * 3),
    "a normalizer of normal forms": normalize({"type": "NFKD"}, swap("a", "\ufdfa"), {"type": "NFKC"}),
    "a normalizer of 1e5 parts": normalize(*[{"type": "Strip", "strip_left": True, "strip_right": True}] * 10**5),
    "a normalizer of no type": normalize({"pattern": {"String": "a"}, "content": "a" * 200}),
    "a normalizer that is a list": lambda f: change_json(f, "tokenizer.json", normalizer=[swap("a", "a" * 200)]),
    "a normalizer of nobody": normalize({"type": "Nobody"}),
    "a normalizer that is deep": lambda f: replace(f, "tokenizer.json", '{"normalizer":' + nest(100_000) + "}"),
    "a table of few bytes": normalize(precompile(b"\0\0\0\xff\xff\xff")),
    "a table of no bytes": normalize(precompile(b"")),
    "a table that is no base64": normalize({"type": "Precompiled", "precompiled_charsmap": "?"}),
    "a table with long texts": normalize(precompile(struct.pack("<I", 4) + bytes(4) + b"a" * 1000 + b"\0")),
    "a table of 2 MB": normalize(precompile(struct.pack("<I", 4) + bytes(2 * MIB))),
    "a table that is no text": normalize(precompile(struct.pack("<I", 4) + bytes(4) + b"\xff\xff\0")),
    "a pattern that takes forever": cut(split("(a+)+$")),
    "a pattern that takes forever, in a normalizer": normalize(swap("((a|b)*c?)*d", "", form="Regex")),
    "a pattern of choices that takes forever": cut(split("(a|aa)+[^a]")),
    "a pattern of 1 MB": cut(split("a" * MIB)),
    "bytes of bytes": cut(*[BYTES] * 12),
    "a pre-tokenizer of 1e5 parts": cut(*[{"type": "Whitespace"}] * 10**5),
    "a post-processor of 1e5 tokens": finish(frame(*[1] * 10**5)),
    "a post-processor with 1e5 copies": finish(frame(1, copies=10**5)),
    "a post-processor of post-processors": finish(*[frame(1, 1, 1, 1)] * 8),
    "a decoder that multiplies": decode(*[swap("a", "a" * 200)] * 3),
    "a decoder that adds 1 MB": decode({"type": "WordPiece", "prefix": "a" * MIB, "cleanup": True}),
    "an added token of 1 MB": lambda f: add_token(f, "a" * MIB),
    "a token of 1 MB": lambda f: change_model(f, vocab={"a" * MIB: 0}, merges=[]),
    "a prefix of 1 MB": lambda f: change_model(f, continuing_subword_prefix="a" * MIB),
    "words of any length": lambda f: change_model(f, type="WordPiece", max_input_chars_per_word=10**9),
}
TEMPLATE_CHANGES: dict[str, Callable[[Path], None]] = {
    "a template that loops": lambda f: replace(
        f, "chat_template.jinja", "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    ),
    "a template of long texts": lambda f: replace(f, "chat_template.jinja", "{{ 'a' * 10**10 }}"),
    "a template in templates": lambda f: replace(f, "chat_template.jinja", "{% if a %}" * 3000 + "{% endif %}" * 3000),
    "a template of many parts": lambda f: replace(f, "chat_template.jinja", "{{ a }}" * 12_000),
    "a template that is too long": lambda f: replace(f, "chat_template.jinja", " " * 200_000),
}
