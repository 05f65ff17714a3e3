"""Conversation -> prompt that remembers who wrote what, so that nothing a user types can act as control or image.

A prompt is a `str` that knows which characters people wrote. Control tokens and image placeholders are read only where
the template wrote every character; all other text, template and user alike, is tokenised in one go between them, so
that harmless text gets the ids it always had (`prompt_ids.py`).
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_NAMES_NOT_TEXT = ("role", "type")
_NAME = re.compile(r"[A-Za-z_][\w-]*", flags=re.ASCII)

Span = tuple[int, int]


class Prompt(str):
    """A rendered conversation: text, and the character ranges [start, end) that people and assistant wrote.

    Slicing or formatting gives a plain `str`, which `encode_prompt` reads as template text from end to end.

    Args:
        text: What the model reads.
        user_spans: Ranges that came from messages, whatever their role. In order, not empty, not overlapping.
        assistant_spans: Ranges inside `{% generation %}`: what the model learns to write.
        learned_spans: Ranges of tokens that the assistant may write; each lies in a range of both others.
    """

    user_spans: tuple[Span, ...]
    assistant_spans: tuple[Span, ...]
    learned_spans: tuple[Span, ...]

    def __new__(
        cls,
        text: str,
        *,
        user_spans: Iterable[Span] = (),
        assistant_spans: Iterable[Span] = (),
        learned_spans: Iterable[Span] = (),
    ) -> "Prompt":
        prompt = super().__new__(cls, text)
        prompt.learned_spans = tuple(learned_spans)
        prompt.user_spans = tuple(user_spans)
        prompt.assistant_spans = tuple(assistant_spans)
        return prompt


def render_prompt(
    messages: list[dict[str, Any]],
    template: str,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    control_tokens: Iterable[str] = (),
    learn_tokens: Iterable[str] = (),
    **template_variables: Any,
) -> Prompt:
    """Writes a conversation in the words of a chat template.

    Every string of a message counts as written by a user, except its role, item types and keys where those are plain
    names. It is rendered between two private-use characters that occur nowhere in the input, so private-use
    characters of the user are plain text.

    Args:
        messages: `[{"role": ..., "content": text or [{"type": "image"}, {"type": "text", "text": ...}]}]`.
        template: Jinja text, rendered by transformers' own sandbox.
        add_generation_prompt: End where the assistant begins to write.
        continue_final_message: End inside the last message, for the model to go on with.
        control_tokens: Needed for templates that cut messages into pieces: these literals are marked one by one.
        learn_tokens: Tokens that count as such where the assistant wrote them, inside `{% generation %}`.
        **template_variables: Variables of the template; trusted, like the template.

    Raises:
        ValueError: if the template cuts messages into pieces and `control_tokens` is empty.
    """
    markers = _choose_markers(chain(_strings(messages), _strings(template_variables), [template]), control_tokens)
    rendered, generation_spans = render_jinja_template(
        conversations=[markers.mark(messages)],
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        return_assistant_tokens_mask=_GENERATION_TAG.search(template) is not None,
        **template_variables,
    )
    marked = rendered[0]
    positions = markers.find(marked)
    text = "".join(character for character in marked if character not in (markers.opening, markers.closing))
    assistant_spans = [
        (start - bisect_left(positions, start), min(end - bisect_left(positions, end), len(text)))
        for start, end in chain.from_iterable(generation_spans)
    ]
    assistant_spans = [(start, end) for start, end in assistant_spans if start < end]
    user_spans = markers.pair(marked, positions)
    return Prompt(
        text,
        user_spans=user_spans,
        assistant_spans=assistant_spans,
        learned_spans=_find_learned(text, user_spans, assistant_spans, compile_literals(tuple(learn_tokens))),
    )


def _find_learned(
    text: str, user_spans: list[Span], assistant_spans: list[Span], learned: re.Pattern[str] | None
) -> list[Span]:
    """The learned tokens in what the assistant wrote; the template's own words around it are no part of that."""
    if learned is None:
        return []
    overlaps = ((max(start, first), min(end, last)) for start, end in user_spans for first, last in assistant_spans)
    return [match.span() for start, end in overlaps if start < end for match in learned.finditer(text, start, end)]


def count_images(prompt: str, image_token: str) -> int:
    """How many images a prompt asks for: an `image_token` that a user typed does not count."""
    return sum(prompt.count(image_token, start, end) for start, end in list_template_spans(prompt))


def list_template_spans(prompt: str) -> list[Span]:
    """The ranges that no user wrote: everything, in a plain `str`."""
    user_spans = prompt.user_spans if isinstance(prompt, Prompt) else ()
    starts = [0, *(end for _, end in user_spans)]
    ends = [*(start for start, _ in user_spans), len(prompt)]
    return list(zip(starts, ends))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from chain.from_iterable(map(_strings, chain(value.keys(), value.values())))
    elif isinstance(value, (list, tuple)):
        yield from chain.from_iterable(map(_strings, value))


def _choose_markers(texts: Iterable[str], control_tokens: Iterable[str]) -> "_Markers":
    used = set().union(*texts)
    free = list(islice((chr(code) for code in chain.from_iterable(_PRIVATE_USE) if chr(code) not in used), 2))
    if len(free) < 2:
        raise ValueError("got messages with every private-use character; expected two left over; remove some of them")
    return _Markers(*free, compile_literals(tuple(control_tokens)))


@lru_cache(maxsize=16)
def compile_literals(literals: tuple[str, ...]) -> re.Pattern[str] | None:
    """What finds the longest of them; None of none."""
    longest_first = sorted(literals, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if literals else None


@dataclass(frozen=True)
class _Markers:
    opening: str
    closing: str
    control_tokens: re.Pattern[str] | None

    def mark(self, value: Any) -> Any:
        """Puts markers around strings, inside their outer white space: templates may trim that."""
        if isinstance(value, str):
            core = value.strip()
            if not core:
                return value
            before, after = value.split(core, 1)
            if self.control_tokens is not None:
                core = self.control_tokens.sub(rf"{self.opening}\g<0>{self.closing}", core)
            return f"{before}{self.opening}{core}{self.closing}{after}"
        if isinstance(value, dict):
            return {
                self._mark_odd(key) if isinstance(key, str) else key: (
                    self._mark_odd(item) if key in _NAMES_NOT_TEXT else self.mark(item)
                )
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.mark(item) for item in value]
        return value

    def _mark_odd(self, value: Any) -> Any:
        """Templates look for names as they are, and write some of them."""
        return value if isinstance(value, str) and _NAME.fullmatch(value) else self.mark(value)

    def find(self, marked: str) -> list[int]:
        return [match.start() for match in re.finditer(f"[{self.opening}{self.closing}]", marked)]

    def pair(self, marked: str, positions: list[int]) -> list[Span]:
        """Ranges between paired markers, as positions in the text without markers; touching ranges are joined."""
        spans, open_starts, num_lone = [], [], 0
        for num_before, position in enumerate(positions):
            if marked[position] == self.opening:
                open_starts.append(position - num_before)
            elif open_starts:
                spans.append((open_starts.pop(), position - num_before))
            else:
                num_lone += 1
        if (num_lone or open_starts) and self.control_tokens is None:
            raise ValueError(
                "got a chat template that cuts messages into pieces; expected the control tokens to look for in each "
                "piece; pass control_tokens=list_control_tokens(tokenizer, image_token=...)"
            )
        joined: list[Span] = []
        for start, end in sorted(span for span in spans if span[0] < span[1]):
            if joined and start <= joined[-1][1]:
                start, end = joined[-1][0], max(end, joined.pop()[1])
            joined.append((start, end))
        return joined
