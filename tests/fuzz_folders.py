"""Folders of small checkpoints with random changes, for `tests/fuzz.py`."""

import builtins
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from processing_llava.messages import MAX_LINE
from processing_llava.processing_llava import AnyLlavaProcessor
from tests.modeling_llava.checkpoints import odd_values
from tests.modeling_llava.checkpoints.folder_changes import LAYOUTS
from tests.modeling_llava.checkpoints.hostile_folders import answer, load
from tests.modeling_llava.checkpoints.hostile_tokenizers import BYTES, chain, frame, precompile, split, swap

NAMES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json",
    "added_tokens.json", "adapter_config.json", "model.safetensors", "adapter_model.safetensors", "mm_projector.bin",
    "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "../tower/config.json", "../base/config.json",
    "../tower/preprocessor_config.json", "../tower/model.safetensors",
)  # fmt: skip
TARGETS = ("/dev/zero", "/etc/hostname", "..", ".", "config.json", "../tower/config.json", "nothing", "/proc/self/mem")
NUMBERS = st.sampled_from([0, -1, 1, 2, 7, 255, 256, 10**5, 2**31, 2**63, 10**30, 1e308, float("inf"), float("nan")])
TEXTS = st.sampled_from(["", "a", "..", "/", "gelu", "llava", "llama", "true", "\0", "\ud800", "(.*)*x"])
VALUES = st.recursive(
    NUMBERS | TEXTS | st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXTS, values, max_size=3),
    max_leaves=6,
)
FILTERS = (
    " | length",
    " | list",
    " | join",
    " | string",
    " | tojson",
    " | sort",
    " | map('string') | list",
    " | upper",
)
METHODS = (".strip()", ".upper()", ".split()", ".items()", " | replace('a', 'bbbb')", " | indent(999)", "[0]")
CALLS = (" | join({})", ".split({})", ".replace('', {})", ".join({})", " | indent({})", " | default({})", ".strip({})")
FIELDS = (*odd_values.GENERATION, *odd_values.CONFIG)
PLACES = st.integers(0, 10**6)
CHANGES = st.one_of(
    st.tuples(st.just("value"), PLACES, VALUES),
    st.tuples(st.just("field"), PLACES, VALUES),
    st.tuples(st.just("remove"), PLACES, st.none()),
    st.tuples(st.just("bytes"), PLACES, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("cut"), PLACES, st.none()),
    st.tuples(st.just("content"), PLACES, VALUES),
    st.tuples(st.just("link"), PLACES, st.sampled_from(TARGETS)),
)

COUNTS = st.sampled_from([0, 1, 3, 60, 999, 99_999, 10**9])
STRINGS = st.sampled_from(
    ["'ab'", "'\\n'", "''", "x", "n.x", "messages", "messages[0].content", "range(9)", "[1]", "{}"]
)
EXPRESSIONS = st.recursive(
    STRINGS | COUNTS.map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "*", "**", "%", "//", "~", "==", "in", "and"]), inner).map(" ".join),
        st.tuples(inner, st.sampled_from([*FILTERS, *METHODS])).map("".join).map("({})".format),
        st.tuples(inner, st.sampled_from(CALLS), inner).map(lambda part: f"({part[0]}{part[1].format(part[2])})"),
        st.tuples(inner, inner).map("[{0[0]}, {0[1]}]".format),
        inner.map("({})[1:]".format),
        inner.map("f({})".format),
    ),
    max_leaves=8,
)
STATEMENTS = st.recursive(
    st.one_of(
        EXPRESSIONS.map("{{{{ {} }}}}".format),
        EXPRESSIONS.map("{{% set n.x = {} %}}".format),
        EXPRESSIONS.map("{{% set x = {} %}}".format),
        st.integers(0, 5000).map("y".__mul__),
    ),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(COUNTS, inner).map("{{% for a in range({0[0]}) %}}{0[1]}{{% endfor %}}".format),
        st.tuples(EXPRESSIONS, inner).map("{{% for a in {0[0]} %}}{0[1]}{{% endfor %}}".format),
        st.tuples(EXPRESSIONS, inner).map("{{% if {0[0]} %}}{0[1]}{{% endif %}}".format),
        inner.map("{{% set x %}}{}{{% endset %}}".format),
        inner.map("{{% macro f(x) %}}{}{{% endmacro %}}".format),
    ),
    max_leaves=6,
)
TEMPLATES = STATEMENTS.map(
    "{{% set n = namespace(x='ab') %}}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}{}".format
)
REPLACEMENTS = st.builds(
    lambda form, pattern, size: swap(pattern, "a" * size, form=form),
    st.sampled_from(["String", "Regex"]),
    st.sampled_from(["", "a", ".", "(a+)+b", " "]),
    st.sampled_from([0, 1, 2, 9, 80, 999]),
)
NAMED = st.sampled_from(["NFKD", "NFC", "Lowercase", "ByteLevel", "Nmt", "Digits", "Fuse"]).map(
    lambda name: {"type": name}
)
PARTS = {
    "normalizer": REPLACEMENTS
    | st.integers(0, 200).map(lambda size: {"type": "Prepend", "prepend": "a" * size})
    | st.binary(max_size=40).map(precompile),
    "pre_tokenizer": st.sampled_from(["(a|b)*c", "a*a*a*b", "", "\\s+(?!\\S)"]).map(split) | st.just(BYTES),
    "decoder": REPLACEMENTS,
    "post_processor": st.builds(
        lambda ids, copies: frame(*ids, copies=copies),
        st.lists(st.just(1), max_size=9),
        st.sampled_from([1, 2, 9, 999]),
    ),
}
INNER = {
    **{"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"},
    **{"decoder": "decoders", "post_processor": "processors"},
}
PROGRAMS = st.one_of(
    st.tuples(st.just("chat_template.jinja"), st.tuples(st.just("text"), st.just(0), TEMPLATES)),
    *(
        st.lists(PARTS[section] | NAMED, min_size=1, max_size=4).map(
            lambda parts, section=section: (
                "tokenizer.json",
                ("section", section, chain(INNER[section], tuple(parts))),
            )
        )
        for section in PARTS
    ),
)
FOLDERS = st.tuples(
    st.sampled_from(list(LAYOUTS)),
    st.lists(st.tuples(st.sampled_from(NAMES), CHANGES) | PROGRAMS, min_size=1, max_size=3),
)
"""A folder, and what is changed in it; among that templates and tokenizers that are programs."""


def change_value(content: Any, place: int, value: Any, *, remove: bool) -> None:
    """Put a value into one of the places of JSON, in place; or take out what is there."""
    places, open_parts = [], [content]
    while open_parts:
        part = open_parts.pop()
        inner = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        for key, item in inner:
            places.append((part, key))
            open_parts.append(item)
    if places:
        part, key = places[place % len(places)]
        if remove:
            del part[key]
        else:
            part[key] = value


def change_file(path: Path, kind: str, place: int | str, value: Any) -> None:
    """Change a file in place, if there is one of that kind."""
    if kind == "text":
        path.unlink(missing_ok=True)
        path.write_text(value)
        return
    if kind == "section":
        if path.is_file() and not path.is_symlink():
            with suppress(ValueError, TypeError):  # another change was there before
                path.write_text(json.dumps(json.loads(path.read_text()) | {place: value}))
        return
    if kind in ("value", "remove", "field"):
        if path.suffix == ".json" and path.is_file():
            try:
                content = json.loads(path.read_text())
            except ValueError:
                return  # another change was there before
            if kind != "field":
                change_value(content, place, value, remove=kind == "remove")
            elif isinstance(content, dict):
                content[FIELDS[place % len(FIELDS)]] = value
            path.write_text(json.dumps(content))
    elif kind == "content":
        path.unlink(missing_ok=True)
        path.write_text(json.dumps(value))
    elif kind == "link":
        path.unlink(missing_ok=True)
        path.symlink_to(value)
    elif path.is_file() and not path.is_symlink() and (data := bytearray(path.read_bytes())):
        start = place % len(data)
        if kind == "cut":
            del data[start:]
        else:
            data[start : start + len(value)] = value
        path.write_bytes(data)


class AskedError(BaseException):
    """Somebody was asked, whatever is caught in between."""


def refuse_to_answer(*arguments: object) -> str:
    raise AskedError(arguments)


def build_folder_check() -> Callable[[object], None]:
    """What loads a changed folder and answers with it: it does, or a line says why not."""
    root = tempfile.TemporaryDirectory()
    for layout, write in LAYOUTS.items():
        write(Path(root.name) / layout)
    numbers = count()
    builtins.input = refuse_to_answer

    def check_folder(value: object) -> None:
        layout, changes = value or ("any_llava", [])
        copied = Path(root.name) / f"copy{next(numbers)}"
        shutil.copytree(Path(root.name) / layout, copied)
        for name, change in changes:
            path = copied / "model" / name
            if path.parent.is_dir():
                change_file(path, *change)
        try:
            load(layout, copied / "model")
            if layout == "any_llava" and any(name in ("chat_template.jinja", "tokenizer.json") for name, _ in changes):
                processor = AnyLlavaProcessor.from_pretrained(copied / "model")
                messages = [{"role": "user", "content": "What is the aab?\n" * 20}]
                processor.tokenizer.decode(processor.apply_chat_template(messages, tokenize=True)[0])
            if layout != "projector":
                answer(copied / "model")
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and len(str(error)) <= MAX_LINE, str(error)
        finally:
            shutil.rmtree(copied)

    return check_folder
