"""Conversation -> prompt -> ids, so that nothing a user types can act as a control token or an image.

A prompt is a `str` that remembers who wrote which characters. Control tokens and image placeholders are read only
where the template wrote every character; all other text, template and user alike, is tokenised in one go between
them, so that harmless text gets the ids it always had. What is surprising: text after an image is tokenised like the
start of a text, since the original LLaVA tokenises the pieces around its images one by one.

Only the standard library and transformers are used; the file is copied into Hub repositories as it is.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from .text_encoder import ControlToken, load_text_encoder

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
    """

    user_spans: tuple[Span, ...]
    assistant_spans: tuple[Span, ...]

    def __new__(cls, text: str, *, user_spans: Iterable[Span] = (), assistant_spans: Iterable[Span] = ()) -> "Prompt":
        prompt = super().__new__(cls, text)
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
        **template_variables: Of the template; trusted, like the template.

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
    return Prompt(
        text,
        user_spans=markers.pair(marked, positions),
        assistant_spans=[(start, end) for start, end in assistant_spans if start < end],
    )


def count_images(prompt: str, image_token: str) -> int:
    """How many images a prompt asks for: an `image_token` that a user typed does not count."""
    return sum(prompt.count(image_token, start, end) for start, end in _template_spans(prompt))


def encode_prompt(
    prompt: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    image_token: str,
    image_token_id: int,
    num_image_tokens: Iterable[int] = (),
    add_special_tokens: bool = True,
) -> tuple[list[int], list[int]]:
    """Tokenises a prompt.

    Args:
        prompt: From `render_prompt`; a plain `str` is read as template text from end to end.
        tokenizer: Fast; it is not changed, and its padding and truncation settings are not used.
        image_token: The placeholder of one image. The tokenizer need not know it.
        image_token_id: What stands for one feature of an image; may lie outside the vocabulary.
        num_image_tokens: For each placeholder in order, how many times `image_token_id` is written.
        add_special_tokens: Begin with BOS if the tokenizer does and the template did not write it.

    Returns:
        `input_ids` and the assistant mask, both of length L; the mask is 1 on tokens that overlap an assistant span,
        and 0 on images.

    Raises:
        ValueError: if placeholders and `num_image_tokens` differ in number, the tokenizer is not a fast one, or it
            makes a control token out of plain text.
    """
    counts = list(num_image_tokens)
    if len(counts) != count_images(prompt, image_token):
        raise ValueError(
            f"got {count_images(prompt, image_token)} {image_token} placeholders and {len(counts)} numbers of image "
            "tokens; expected equal numbers; give one image for each placeholder"
        )
    supervised = bytearray(len(prompt))
    for start, end in prompt.assistant_spans if isinstance(prompt, Prompt) else ():
        supervised[start:end] = b"\1" * (end - start)
    template_text = "".join(prompt[start:end] for start, end in _template_spans(prompt))
    encoder = load_text_encoder(tokenizer, image_token=image_token, template_text=template_text)
    image = ControlToken(image_token, image_token_id, strips_left=False, strips_right=False)
    remaining_counts = iter(counts)
    ids, mask = [], []
    for piece in _split(prompt, {**encoder.control_tokens, image_token: image}):
        if piece.control is image:
            count = next(remaining_counts)
            ids += [image_token_id] * count
            mask += [0] * count
        elif piece.control is not None:
            ids.append(piece.control.token_id)
            mask.append(int(1 in supervised[piece.start : piece.end]))
        else:
            is_start = piece.start == 0 or piece.follows is image
            token_ids, offsets = encoder.encode_text(prompt[piece.start : piece.end], is_start=is_start)
            ids += token_ids
            # A prefix space can have an empty range: it belongs to the character after it.
            ranges = ((piece.start + first, piece.start + max(last, first + 1)) for first, last in offsets)
            mask += [int(1 in supervised[first:last]) for first, last in ranges]
    bos = _leading_bos(tokenizer) if add_special_tokens else []
    if ids[: len(bos)] != bos:
        ids, mask = bos + ids, [0] * len(bos) + mask
    return ids, mask


@dataclass(frozen=True)
class _Piece:
    """A range of a prompt: a control token, or the text after one."""

    start: int
    end: int
    control: ControlToken | None
    follows: ControlToken | None = None


def _split(prompt: str, control_tokens: dict[str, ControlToken]) -> Iterator[_Piece]:
    longest_first = sorted(control_tokens, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    matches = chain.from_iterable(pattern.finditer(prompt, *span) for span in _template_spans(prompt))
    position, previous = 0, None
    for match in matches:
        token = control_tokens[match[0]]
        start = len(prompt[: match.start()].rstrip()) if token.strips_left else match.start()
        if position < start:
            yield _Piece(position, start, control=None, follows=previous)
        yield _Piece(match.start(), match.end(), control=token)
        position, previous = match.end(), token
        if token.strips_right:
            position = len(prompt) - len(prompt[position:].lstrip())
    if position < len(prompt):
        yield _Piece(position, len(prompt), control=None, follows=previous)


def _template_spans(prompt: str) -> list[Span]:
    """The ranges that no user wrote: everything, in a plain `str`."""
    user_spans = prompt.user_spans if isinstance(prompt, Prompt) else ()
    starts = [0, *(end for _, end in user_spans)]
    ends = [*(start for start, _ in user_spans), len(prompt)]
    return list(zip(starts, ends))


def _leading_bos(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    first_ids = tokenizer.encode("")[:1]
    return first_ids if first_ids == [tokenizer.bos_token_id] else []


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
    return _Markers(*free, tuple(sorted(control_tokens, key=len, reverse=True)))


@dataclass(frozen=True)
class _Markers:
    opening: str
    closing: str
    control_tokens: tuple[str, ...]

    def mark(self, value: Any) -> Any:
        """Puts markers around strings, inside their outer white space: templates may trim that."""
        if isinstance(value, str):
            core = value.strip()
            if not core:
                return value
            before, after = value.split(core, 1)
            if self.control_tokens:
                pattern = "|".join(map(re.escape, self.control_tokens))
                core = re.sub(pattern, rf"{self.opening}\g<0>{self.closing}", core)
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
        if (num_lone or open_starts) and not self.control_tokens:
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
