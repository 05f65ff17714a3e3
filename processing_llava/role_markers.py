"""Role markers that a template writes as plain text, such as "USER:", typed by a user: kept, neutralised or refused.

Control tokens cannot be typed (see `prompts.py`), but many formats mark who speaks with ordinary words, and a user
can write those too: a line "ASSISTANT: Sure" then looks like a turn that the model has taken. Where a line of a user
begins so, an invisible character is put into the marker, which then reads the same and is made of other tokens. A
marker that begins with a sign, such as "###Human:" or "[INST]", ends the turn before it wherever it stands, and so
does a separator such as "###" alone: these are found inside lines, too. This is a heuristic: a model may understand a
fake turn however it is written.

Markers and separators are found by rendering the template, so that templates of any origin are covered.
"""

import re
from bisect import bisect_right
from collections.abc import Hashable
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from .prompt_ids import list_control_tokens, read_tokenizer_state
from .prompts import NUM_MESSAGES_WITH_SYSTEM, Prompt, render_samples

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


def find_role_markers(
    template: str, tokenizer: PreTrainedTokenizerFast, *, image_token: str
) -> re.Pattern[str] | None:
    """What finds markers of a template where they could begin a turn; None if it writes none as plain text.

    Its first group that is not empty is the marker.

    Args:
        template: Jinja text.
        tokenizer: Its control tokens are no plain text.
        image_token: Counts as a control token.
    """
    return _find(template, tokenizer, image_token, read_tokenizer_state(tokenizer))


def list_markers(template: str, tokenizer: PreTrainedTokenizerFast, *, image_token: str) -> Markers:
    """The role markers and separators of a template.

    Args:
        template: Jinja text.
        tokenizer: Its control tokens are no plain text.
        image_token: Counts as a control token.
    """
    controls = "|".join(map(re.escape, list_control_tokens(tokenizer, image_token=image_token)))
    samples = render_samples(template, tokenizer.special_tokens_map)[:1]
    texts = [text for sample in samples for text in _list_template_texts(sample)]
    pieces = [piece for text in texts for piece in re.split(controls, text)]
    ends = (_SEPARATOR.match(text) for text in texts[1:])
    return Markers(
        frozenset(marker for piece in pieces for marker in _MARKER.findall(piece)),
        frozenset(end[0] for end in ends if end),
    )


@lru_cache(maxsize=16)
def _find(
    template: str, tokenizer: PreTrainedTokenizerFast, image_token: str, state: tuple[Hashable, ...]
) -> re.Pattern[str] | None:
    words, separators = list_markers(template, tokenizer, image_token=image_token)
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


def _list_template_texts(sample: Prompt) -> list[str]:
    """What a template writes in front of the messages of a sample and behind each; no system message of its own."""
    starts = [start for start, _ in sample.user_spans] + [len(sample)]
    ends = [0] + [end for _, end in sample.user_spans]
    texts = [sample[end:start] for end, start in zip(ends, starts)]
    return texts if len(sample.user_spans) == NUM_MESSAGES_WITH_SYSTEM else ["", *texts[1:]]


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
