"""A tokenizer.json is a program of a stranger: how much longer it makes a text is computed before anybody runs it.

Each part of it turns a character into at most so many, and what follows on each other multiplies. The constants are
those of Unicode, for normal forms, and of bytes; the rest stands in the file. Patterns have a bound of form, since a
repeated group of repetitions or choices can take a time that doubles with each character.
"""

import base64
import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from processing_llava.messages import shorten

MAX_GROWTH = {"texts": 100, "post_processor": 64, "decoder": 100}
"""Characters that may become of one, by normalizer and pre-tokenizer together; tokens and texts that may become of a
text; characters that may become of one of a token. Of published tokenizers, XLM-R has the most: 72, 4 and 1."""
MAX_PARTS, MAX_STRING, MAX_PATTERN, MAX_CHARSMAP = 64, 1_000, 5_000, 2**20
_INNER = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
_GROWTH = {
    "normalizer": {
        **{"NFC": 4, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 3, "BertNormalizer": 12, "ByteLevel": 4},
        **{"Strip": 1, "StripAccents": 1, "Nmt": 1},
    },
    "pre_tokenizer": {
        **{"ByteLevel": 4, "Metaspace": 2, "BertPreTokenizer": 1, "CharDelimiterSplit": 1, "Digits": 1},
        **{"FixedLength": 1, "Punctuation": 1, "Split": 1, "UnicodeScripts": 1, "Whitespace": 1, "WhitespaceSplit": 1},
    },
    "post_processor": {"ByteLevel": 1, "BertProcessing": 3, "RobertaProcessing": 4},
    "decoder": {
        **{"BPEDecoder": 2, "CTC": 2, "WordPiece": 2, "Metaspace": 2},
        **{"ByteFallback": 1, "ByteLevel": 1, "Fuse": 1, "Strip": 1},
    },
}
"""What a part makes of one, at most; those that are not here say it themselves."""


class _FaultError(ValueError):
    """What is wrong with a file."""


def check_tokenizer(path: Path) -> None:
    """Refuse a tokenizer.json that makes texts much longer, or holds what no tokenizer needs.

    What is no JSON is left to those who read it next, and say so.

    Raises:
        ValueError: naming the file and the element.
    """
    found = path.stat()
    fault = _find_fault(str(path), found.st_size, found.st_mtime_ns)
    if fault is not None:
        raise ValueError(f"got {path} with {fault}: take another tokenizer")


@functools.lru_cache(maxsize=16)
def _find_fault(path: str, size: int, modified: int) -> str | None:
    """What is wrong with a file; once for each content."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        return None
    try:
        _check_content(content)
    except _FaultError as error:
        return str(error)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        return f"parts of another form ({type(error).__name__}: {shorten(str(error))}); expected those of tokenizers"
    return None


def _check_content(content: dict[str, Any]) -> None:
    grown = {}
    for section in _INNER:
        parts = list(_flatten(content.get(section), section))
        if len(parts) > MAX_PARTS:
            raise _FaultError(f"a {section} of {len(parts):,} parts; expected at most {MAX_PARTS}")
        for part in parts:
            _check_strings(part, f"a {section} {part['type']}")
        grown[section] = [(_grow(part, section), f"{section} {part['type']}") for part in parts]
    grown["texts"] = [*grown.pop("normalizer"), *grown.pop("pre_tokenizer")]
    for section, factors in grown.items():
        product = math.prod(factor for factor, _ in factors)
        if product > MAX_GROWTH[section]:
            longest, name = max(factors)
            raise _FaultError(
                f"parts that make up to {product:,} out of one, the {name} {longest:,} of them; expected at most "
                f"{MAX_GROWTH[section]}"
            )
    model = content["model"]
    vocab = model.get("vocab", {})
    names = vocab if isinstance(vocab, dict) else (entry[0] for entry in vocab)
    settings = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    _check_strings([settings, *(token["content"] for token in content.get("added_tokens", ()))], "a token")
    if max(map(len, names), default=0) > MAX_STRING:
        raise _FaultError(f"a token of more than {MAX_STRING:,} characters; expected shorter ones")
    if (model.get("max_input_chars_per_word") or 0) > MAX_STRING:
        raise _FaultError(f"words of more than {MAX_STRING:,} characters; expected shorter ones")


def _flatten(part: Any, section: str) -> Iterator[dict[str, Any]]:
    """The parts of a section, without the sequences that hold them, in any depth."""
    waiting = [] if part is None else [part]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise _FaultError(f"a {section} {shorten(part)}; expected an object with its type")
        if part["type"] == "Sequence":
            waiting += part[_INNER[section]]
        else:
            yield part


def _grow(part: dict[str, Any], section: str) -> int:
    """How many a part makes of one, at most."""
    kind = part["type"]
    if kind == "Replace" and section in ("normalizer", "decoder"):
        ((form, pattern),) = part["pattern"].items()
        if form == "String" and pattern:
            return max(1, math.ceil(len(part["content"]) / len(pattern)))
        return 1 + len(part["content"])
    if kind == "Prepend" and section == "normalizer":
        return 1 + len(part["prepend"])
    if kind == "Precompiled" and section == "normalizer":
        return _measure_charsmap(part["precompiled_charsmap"])
    if kind == "TemplateProcessing" and section == "post_processor":
        lengths = {name: len(token["ids"]) for name, token in part["special_tokens"].items()}
        pieces = (lengths.get(piece.get("SpecialToken", {}).get("id"), 1) for piece in part["single"] + part["pair"])
        return sum(pieces)
    if kind not in _GROWTH[section]:
        raise _FaultError(f"the {section} {shorten(kind)}; expected one of which it is known what it makes of a text")
    return _GROWTH[section][kind]


def _measure_charsmap(encoded: str) -> int:
    """The longest text that a table of SentencePiece puts in place of another."""
    data = base64.b64decode(encoded, validate=True)
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 or size % 4 or size > len(data) - 4:
        raise _FaultError("a normalizer Precompiled whose table is broken; expected one of SentencePiece")
    return max(map(len, data[4 + size :].decode().split("\0")), default=1) or 1


def _check_strings(value: Any, name: str) -> None:
    """Refuse long strings, and patterns that can take forever."""
    waiting = [("", value)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [("", item) for item in value]
        elif isinstance(value, str):
            most = {"precompiled_charsmap": MAX_CHARSMAP, "Regex": MAX_PATTERN}.get(key, MAX_STRING)
            if len(value) > most:
                raise _FaultError(f"{name} of {len(value):,} characters; expected at most {most:,}")
            if key == "Regex" and _can_double(value):
                raise _FaultError(
                    f"{name} whose pattern {shorten(value)} repeats a group of repetitions or choices; expected one "
                    "with a single way to match"
                )


def _can_double(pattern: str) -> bool:
    """Whether a group that is repeated holds something that is repeated, or a choice: there are many ways to match."""
    holds = [False]
    for sign in re.finditer(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", pattern, flags=re.DOTALL):
        if sign[0] == "(":
            holds.append(False)
        elif sign[0] == ")" and len(holds) > 1:
            inner = holds.pop()
            if inner and pattern[sign.end() : sign.end() + 1] in ("*", "+", "{"):
                return True
            holds[-1] |= inner
        elif sign[0] in "*+{|":
            holds[-1] = True
    return False
