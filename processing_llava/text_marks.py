"""Marks around the texts of messages, so that it shows in a rendered template who wrote what.

A text is put between two private-use characters that occur nowhere in the input, and each pair of them that comes out
of the template holds a text. What is surprising: that alone would trust the template. Python's `repr`, `tojson` with
`ensure_ascii`, filters and slices lose marks, and the text between them would then look as if the template had written
it. So a conversation is also rendered with inert texts in place of its own: whatever the template writes itself is the
same both times, and what is not the same came out of a message without its marks.
"""

import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from typing import Any

from jinja2 import Environment

from .messages import open_value

Wrap = Callable[[str], str]

_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_HOLDS_NAME = ("role", "type")
_KNOWN_NAMES = frozenset(
    (*("role", "content", "type", "text", "image", "image_url", "reasoning_content", "thinking", "reasoning"),)
    + (*("system", "user", "assistant", "tool"),)
)
"""transformers reads the keys (transformers 5.23, utils/chat_template_utils.py); templates build tokens of the roles,
as in "<|" ~ role ~ "|>"."""
_NAME = re.compile(r"[A-Za-z_][\w-]*", flags=re.ASCII)
_LEXER = Environment().lexer


@dataclass(frozen=True)
class TemplateSource:
    """What stands in a chat template.

    Args:
        text: Everything that it can write without a message: its words and string constants.
        names: Names, and string constants that could be some. Roles, item types and keys that are among them must
            reach the template as they are, since it may look for them.
        units: Finds characters that are no white space, and what a template may look for in texts, or cut them at,
            in one piece.
        kept: Finds the latter, and white space; has one group around all.
    """

    text: str
    names: frozenset[str]
    units: re.Pattern[str]
    kept: re.Pattern[str]


@lru_cache(maxsize=64)
def read_source(template: str) -> TemplateSource:
    """The words of a template.

    Raises:
        jinja2.TemplateError: it is no Jinja text.
    """
    tokens = [(token.type, token.value) for token in _LEXER.tokenize(template) if isinstance(token.value, str)]
    constants = [value for kind, value in tokens if kind == "string"]
    # Of plain letters, since constants can be control tokens.
    names = {value for kind, value in tokens if kind in ("name", "string") and _NAME.fullmatch(value)}
    longest_first = sorted({value for value in constants if value.strip()}, key=len, reverse=True)
    units = [*map(re.escape, longest_first), r"\S"]
    kept = [*units[:-1], r"\s+"]
    text = "\0".join(value for kind, value in tokens if kind in ("string", "data"))
    return TemplateSource(text, _KNOWN_NAMES | names, re.compile("|".join(units)), re.compile(f"({'|'.join(kept)})"))


@lru_cache(maxsize=16)
def compile_literals(literals: tuple[str, ...]) -> re.Pattern[str] | None:
    """What finds the longest of them; None of none."""
    longest_first = sorted(literals, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if literals else None


def replace_texts(value: Any, wrap: Wrap, names: frozenset[str]) -> Any:
    """A value with `wrap` around each text in it, inside its outer white space: templates may trim that.

    Args:
        value: Messages, or anything in them. What JSON does not know is opened as `messages.open_value` does.
        wrap: Its argument neither begins nor ends with white space, and is not empty.
        names: Roles, types and keys that stay as they are.
    """
    if isinstance(value, str):
        value = str.__str__(value)
        core = value.strip()
        if not core:
            return value
        before, after = value.split(core, 1)
        return f"{before}{wrap(core)}{after}"
    value = open_value(value)
    if isinstance(value, dict):
        return {
            key if key in names else _replace_key(key, wrap, names): (
                item
                if key in _HOLDS_NAME and isinstance(item, str) and item in names
                else replace_texts(item, wrap, names)
            )
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [replace_texts(item, wrap, names) for item in value]
    return replace_texts(value, wrap, names) if isinstance(value, str) else value


def _replace_key(key: Any, wrap: Wrap, names: frozenset[str]) -> Any:
    """Keys that are objects become the name of their type: a list is no key."""
    is_object = not isinstance(key, (str, bool, int, float, type(None)))
    return replace_texts(f"<{type(key).__name__}>" if is_object else key, wrap, names)


def list_numbers(value: Any) -> Iterator[int | float]:
    """Every number in messages."""
    value = open_value(value)
    if isinstance(value, (dict, list)):
        entries = chain(value.keys(), value.values()) if isinstance(value, dict) else value
        yield from chain.from_iterable(map(list_numbers, entries))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def list_texts(value: Any) -> Iterator[str]:
    """Every string of messages, keys and names included."""
    if isinstance(value, str):
        yield value
        return
    value = open_value(value)
    if isinstance(value, dict):
        yield from chain.from_iterable(map(list_texts, chain(value.keys(), value.values())))
    elif isinstance(value, list):
        yield from chain.from_iterable(map(list_texts, value))
    elif isinstance(value, str):
        yield value


@dataclass(frozen=True)
class TextMarks:
    """Two characters that occur nowhere else. Made by `choose_marks`."""

    opening: str
    closing: str
    pair: re.Pattern[str]
    either: re.Pattern[str]

    def wrap(self, core: str) -> str:
        """A text between the marks."""
        return f"{self.opening}{core}{self.closing}"

    def split(self, marked: str) -> list[str]:
        """Texts of the template at even places, texts between marks at odd ones."""
        return self.pair.split(marked)

    def drop(self, text: str) -> str:
        """A text without marks."""
        return self.either.sub("", text)


@lru_cache(maxsize=16)
def _build_marks(opening: str, closing: str) -> TextMarks:
    either = re.compile(f"[{opening}{closing}]")
    return TextMarks(opening, closing, re.compile(f"{opening}([^{opening}{closing}]*){closing}"), either)


def choose_marks(texts: Iterable[str], template: str) -> TextMarks:
    """Marks that occur in none of the texts, nor in the template.

    Raises:
        ValueError: all private-use characters occur.
    """
    used = set().union(_list_characters(template), *texts)
    free = (chr(code) for code in chain.from_iterable(_PRIVATE_USE) if chr(code) not in used)
    found = list(islice(free, 2))
    if len(found) < 2:
        raise ValueError("got messages with every private-use character; expected two left over; remove some of them")
    return _build_marks(*found)


@lru_cache(maxsize=64)
def _list_characters(template: str) -> frozenset[str]:
    return frozenset(template)


@dataclass
class InertTexts:
    """Replaces texts by others of the same shape, which hold a number that nobody can guess.

    White space stays, and so does what the template may look for in a text, each between such numbers.

    Args:
        source: Of the template.
        words: For each text that was replaced, the numbers that it became.
    """

    source: TemplateSource
    words: dict[str, list[str]] = field(default_factory=dict)
    _secret: str = field(default_factory=lambda: str(10**11 + secrets.randbelow(9 * 10**11)))
    _count: int = 0

    def __call__(self, core: str) -> str:
        self._count += 1
        word = f"{self._secret}{self._count:07d}"
        self.words.setdefault(core, []).append(word)
        pieces = self.source.kept.split(core)
        pieces[::2] = [word + "z" * (len(piece) - len(word)) for piece in pieces[::2]]
        return "".join(pieces)

    def list_missing(self, cores: Iterable[str], rendered: str) -> list[str]:
        """Those of the texts that were replaced and did not come out of the template."""
        return [core for core in cores if not any(word in rendered for word in self.words.get(core, ()))]
