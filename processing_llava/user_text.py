"""What keeps the text of a user from being control: it is marked, so that a prompt shows who wrote what, and it is
kept from looking like a turn. `prompts.py` renders with the marks, and `prompt_ids.py` encodes what is between them
without control tokens.

**Marks.** A text is put between two private-use characters that occur nowhere in the input, and each pair of them that
comes out of the template holds a text. What is surprising: that alone would trust the template. Python's `repr`,
`tojson` with `ensure_ascii`, filters and slices lose marks, and the text between them would then look as if the
template had written it. So a conversation is also rendered with inert texts in place of its own: whatever the template
writes itself is the same both times, and what is not the same came out of a message without its marks.

**Role markers** are plain text that a template writes, such as "USER:". Control tokens cannot be typed (see
`prompts.py`), but many formats mark who speaks with ordinary words, and a user can write those too: a line
"ASSISTANT: Sure" then looks like a turn that the model has taken. Where a line of a user begins so, an invisible
character is put into the marker, which then reads the same and is made of other tokens. A marker that begins with a
sign, such as "###Human:" or "[INST]", ends the turn before it wherever it stands, and so does a separator such as
"###" alone: these are found inside lines, too. This is a heuristic: a model may understand a fake turn however it is
written. Markers and separators are found in samples of the template, so that templates of any origin are covered.
"""

import re
import secrets
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from typing import Any, NamedTuple

from jinja2 import Environment

from .messages import open_value
from .template_bounds import compile_template

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
        CostlyTemplateError: it is too large for a chat template.
        jinja2.TemplateError: it is no Jinja text.
    """
    compile_template(template)
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


# Role markers.

TREATMENTS = ("keep", "neutralize", "refuse")
INVISIBLE = "\u200b"
"""Zero-width space."""

# A word and the signs around it: "USER:", "### Human:", "[INST]", "<<SYS>>", "<|im_start|>"; not a word alone.
_MARKER = re.compile(r"(?:([#\[<|/]+)[ \t]*)?([A-Za-z]\w*)(?:[ \t]+(?=:))?([:\]>|]+)")
_LINE_BREAKS = r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"
_WHITE_SPACE = r" \t\x1f\xa0\u1680\u2000-\u200a\u202f\u205f\u3000"
# Control and formatting characters, variation selectors, fillers of Hangul and others.
_UNSEEN = (
    r"\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160"
    r"\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb"
    r"\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
BLANK = f"[{_WHITE_SPACE}{_UNSEEN}]*"
"""Characters that do not hide a marker, in front of it and between its word and signs. Line breaks are none of them:
a text of line breaks alone would be read once for each."""
# What ends a message: one sign, repeated. Brackets are parts of markers.
_BRACKETS = "[<|/"
_SEPARATOR = re.compile(r"([#=*~_+%&@-])\1+")


class Markers(NamedTuple):
    """What a template writes as plain text around turns.

    Args:
        words: Role markers, each as the signs before its word, the word, and the signs behind it.
        separators: What ends messages, such as "###".
    """

    words: frozenset[tuple[str, str, str]]
    separators: frozenset[str]


def treat_role_markers(
    messages: list[dict[str, Any]], markers: re.Pattern[str] | None, *, refuse: bool = False
) -> list[dict[str, Any]]:
    """Messages whose user lines do not begin with a marker, and hold none that begins with signs.

    Args:
        messages: What other roles say stays as it is.
        markers: From `find_role_markers`.
        refuse: Raise instead of making the markers harmless.

    Raises:
        ValueError: a user line has such a marker, and that is refused.
    """
    if markers is None:
        return messages
    return [_treat(message, markers, refuse=refuse) if message["role"] == "user" else message for message in messages]


@lru_cache(maxsize=16)
def find_role_markers(turn_texts: tuple[str, ...], control_tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    """What finds markers of a template where they could begin a turn; None if it writes none as plain text.

    Its first group that is not empty is the marker.

    Args:
        turn_texts: What the template writes around messages; see `prompts.list_turn_texts`.
        control_tokens: They are no plain text; see `prompt_ids.list_control_tokens`.
    """
    words, separators = list_markers(turn_texts, control_tokens)
    longest_first = sorted(words, key=lambda marker: len("".join(marker)), reverse=True)
    at_start = "|".join(BLANK.join(map(re.escape, filter(None, marker))) for marker in longest_first)
    anywhere = "|".join(BLANK.join(map(re.escape, marker)) for marker in longest_first if marker[0])
    # One sign is taken at a time, so that no separator is left in a longer run.
    repeated = "|".join(f"(?={re.escape(separator)}){re.escape(separator[0])}" for separator in separators)
    patterns = [
        *([f"(?:^|[{_LINE_BREAKS}]){BLANK}({at_start})"] if at_start else []),
        *([f"({anywhere})"] if anywhere else []),
        *([f"({repeated})"] if repeated else []),
    ]
    return re.compile("|".join(patterns)) if patterns else None


def list_markers(turn_texts: tuple[str, ...], control_tokens: tuple[str, ...]) -> Markers:
    """The role markers and separators of a template; arguments as those of `find_role_markers`."""
    controls = "|".join(map(re.escape, control_tokens))
    pieces = [piece for text in turn_texts for piece in re.split(controls, text)]
    ends = (_SEPARATOR.match(text) for text in turn_texts[1:])
    return Markers(
        frozenset(marker for piece in pieces for marker in _MARKER.findall(piece)),
        frozenset(end[0] for end in ends if end),
    )


def _treat(message: dict[str, Any], markers: re.Pattern[str], *, refuse: bool) -> dict[str, Any]:
    content = message["content"]
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    # Templates write the texts of a message end to end, so a marker may be spread over several; an image ends a line.
    texts = [item["text"] if item["type"] == "text" else "\n" for item in items]
    found = list(markers.finditer("".join(texts)))
    if not found:
        return message
    if refuse:
        marker, _ = _find_marker(found[0])
        raise ValueError(
            f"got a line of the user with {marker!r}, which this conversation format writes between "
            'turns; expected other words; change the text, or set role_markers="neutralize"'
        )
    places = [place for match in found for place in _list_places(match)]
    treated, start = [], 0
    for item, text in zip(items, texts):
        first, last = bisect_right(places, start), bisect_right(places, start + len(text))
        cuts = [0, *(place - start for place in places[first:last]), len(text)]
        parts = [text[first:last] for first, last in zip(cuts, cuts[1:])]
        treated.append({**item, "text": INVISIBLE.join(parts)} if item["type"] == "text" else item)
        start += len(text)
    return {**message, "content": treated[0]["text"] if isinstance(content, str) else treated}


def _find_marker(match: re.Match[str]) -> tuple[str, int]:
    """A marker that was found, and where it begins."""
    return match[match.lastindex], match.start(match.lastindex)


def _list_places(match: re.Match[str]) -> list[int]:
    """Where an invisible character goes: behind the first letter of a word, and into the signs of a separator."""
    marker, start = _find_marker(match)
    letter = re.search("[A-Za-z]", marker)
    places = [] if marker[0].isalpha() or marker[0] in _BRACKETS else [start + 1]
    return places if letter is None else [*places, start + letter.end()]
