"""Role markers that a template writes as plain text, such as "USER:", typed by a user: kept, neutralised or refused.

Control tokens cannot be typed (see `prompts.py`), but many formats mark who speaks with ordinary words, and a user
can write those too: a line "ASSISTANT: Sure" then looks like a turn that the model has taken. Where a line of a user
begins so, an invisible character is put into the marker, which then reads the same and is made of other tokens. This
is a heuristic: a model may understand a fake turn however it is written.

The markers are found by rendering the template, so that templates of any origin are covered.
"""

import re
from collections.abc import Hashable
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from .prompt_ids import list_control_tokens, read_tokenizer_state
from .prompts import render_prompt

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
_SYSTEM, _USER, _ASSISTANT = ({"role": role, "content": "."} for role in ("system", "user", "assistant"))
# Not every format knows system messages, or several turns.
_PROBES = ([_SYSTEM, _USER, _ASSISTANT, _USER], [_USER, _ASSISTANT, _USER], [_USER])


def treat_role_markers(
    messages: list[dict[str, Any]], markers: re.Pattern[str] | None, *, refuse: bool = False
) -> list[dict[str, Any]]:
    """Messages whose user lines do not begin with a marker.

    Args:
        messages: What other roles say stays as it is.
        markers: From `find_role_markers`.
        refuse: Raise instead of making the markers harmless.

    Raises:
        ValueError: a user line begins with a marker, and that is refused.
    """
    if markers is None:
        return messages
    return [_treat(message, markers, refuse=refuse) if message["role"] == "user" else message for message in messages]


def find_role_markers(
    template: str, tokenizer: PreTrainedTokenizerFast, *, image_token: str
) -> re.Pattern[str] | None:
    """What finds a role marker of a template at the beginning of a line; None if it writes none as plain text.

    Args:
        template: Jinja text.
        tokenizer: Its control tokens are no plain text.
        image_token: Counts as a control token.
    """
    return _find(template, tokenizer, image_token, read_tokenizer_state(tokenizer))


@lru_cache(maxsize=16)
def _find(
    template: str, tokenizer: PreTrainedTokenizerFast, image_token: str, state: tuple[Hashable, ...]
) -> re.Pattern[str] | None:
    controls = "|".join(map(re.escape, list_control_tokens(tokenizer, image_token=image_token)))
    pieces = [piece for text in _list_template_texts(template, tokenizer) for piece in re.split(controls, text)]
    markers = {marker for piece in pieces for marker in _MARKER.findall(piece)}
    if not markers:
        return None
    longest_first = sorted(markers, key=lambda marker: len("".join(marker)), reverse=True)
    patterns = (BLANK.join(map(re.escape, filter(None, marker))) for marker in longest_first)
    return re.compile(f"(?:^|[{_LINE_BREAKS}]){BLANK}({'|'.join(patterns)})")


def _list_template_texts(template: str, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What a template writes around messages, without a system message of its own."""
    for messages in _PROBES:
        try:
            prompt = render_prompt(messages, template, add_generation_prompt=True, **tokenizer.special_tokens_map)
        except (TemplateError, ValueError):
            continue
        starts = [start for start, _ in prompt.user_spans] + [len(prompt)]
        ends = [0] + [end for _, end in prompt.user_spans]
        pieces = [prompt[end:start] for end, start in zip(ends, starts)]
        return pieces if messages[0] is _SYSTEM else pieces[1:]
    return []


def _treat(message: dict[str, Any], markers: re.Pattern[str], *, refuse: bool) -> dict[str, Any]:
    content = message["content"]
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    # Templates write the texts of a message end to end, so a marker may be spread over several; an image ends a line.
    texts = [item["text"] if item["type"] == "text" else "\n" for item in items]
    found = list(markers.finditer("".join(texts)))
    if not found:
        return message
    if refuse:
        raise ValueError(
            f"got a line of the user that begins with {found[0][1]!r}, which this conversation format writes in front "
            'of turns; expected other words; change the text, or set role_markers="neutralize"'
        )
    places = [match.start(1) + re.search("[A-Za-z]", match[1]).end() for match in found]
    treated, start = [], 0
    for item, text in zip(items, texts):
        cuts = [0, *(place - start for place in places if start < place <= start + len(text)), len(text)]
        parts = [text[first:last] for first, last in zip(cuts, cuts[1:])]
        treated.append({**item, "text": INVISIBLE.join(parts)} if item["type"] == "text" else item)
        start += len(text)
    return {**message, "content": treated[0]["text"] if isinstance(content, str) else treated}
