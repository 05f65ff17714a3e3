"""Prompt -> ids, in which nothing that a user typed is a control token or an image.

What is surprising: text after an image is tokenised like the start of a text, since the original LLaVA tokenises the
pieces around its images one by one.

Only the standard library and transformers are used; the file is copied into Hub repositories as it is.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from transformers import PreTrainedTokenizerFast

from .prompts import Prompt, count_images, list_template_spans
from .text_encoder import ControlToken, load_text_encoder


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
    template_text = "".join(prompt[start:end] for start, end in list_template_spans(prompt))
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
    learned_spans = prompt.learned_spans if isinstance(prompt, Prompt) else ()
    # A learned word that is no control token is found like any other word.
    learned = (match for span in learned_spans if (match := pattern.fullmatch(prompt, *span)))
    written = chain.from_iterable(pattern.finditer(prompt, *span) for span in list_template_spans(prompt))
    matches = sorted(chain(written, learned), key=lambda match: match.start())
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


def _leading_bos(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    first_ids = tokenizer.encode("")[:1]
    return first_ids if first_ids == [tokenizer.bos_token_id] else []
