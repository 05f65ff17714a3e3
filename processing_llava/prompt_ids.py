"""Prompt -> ids, in which nothing that a user typed is a control token or an image.

Plain text becomes ids by a tokenizer's own vocabulary and rules. The fast tokenizer is copied, and the copy changed:
special tokens are not searched for, and merges that would spell one out are gone.

What is surprising: there can be two copies. A SentencePiece tokenizer of the newer kind (`legacy: false`) puts a space
before a text but not after a special token inside it; the prefix rule "first" looks at the position in the whole
string, which a piece of a prompt no longer knows. And text after an image is tokenised like the start of a text, since
the original LLaVA tokenises the pieces around its images one by one.
"""

import json
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from .prompts import Prompt, count_images, list_template_spans
from .user_text import compile_literals

_SIGNS = frozenset("<>[]|")
"""Tokens with one of these, such as "<|im_start|>", can be control tokens even where a tokenizer does not say so."""

_MODEL_SETTINGS = {
    models.BPE: (
        "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
        "ignore_merges",
    ),
    models.Unigram: ("nbest_size", "alpha"),
    models.WordLevel: ("unk_token",),
    models.WordPiece: ("unk_token", "continuing_subword_prefix", "max_input_chars_per_word"),
}  # fmt: skip
_NUM_PROBES = 32
"""Words of a vocabulary that are compared to see whether it is still the same."""
_MANY_TOKENS = 256
"""Most added tokens whose flags are compared for the same reason."""


@contextmanager
def refusing_panics() -> Iterator[None]:
    """Tells the panics of tokenizers, which are no Exceptions (0.23), as errors of the tokenizer.

    Raises:
        ValueError: in their place.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"got a tokenizer whose rules fail ({reason}); expected a whole tokenizer.json: take another one"
        ) from None


@refusing_panics()
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
    encoder = _load_encoder(tokenizer, image_token=image_token, prompt=prompt)
    image = ControlToken(image_token, image_token_id, strips_left=False, strips_right=False)
    remaining_counts = iter(counts)
    ids, mask = [], []
    for piece in _split(prompt, {**encoder.control_tokens, image_token: image}, encoder.literals):
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


def list_control_tokens(tokenizer: PreTrainedTokenizerFast, *, image_token: str) -> tuple[str, ...]:
    """The literals that act as control tokens when a template writes them: added tokens and the image token."""
    return _list_literals(tokenizer, image_token, read_tokenizer_state(tokenizer))


@lru_cache(maxsize=16)
def _list_literals(
    tokenizer: PreTrainedTokenizerFast, image_token: str, state: tuple[Hashable, ...]
) -> tuple[str, ...]:
    acting = _list_acting_tokens(tokenizer, image_token, state)
    return tuple(dict.fromkeys([*(token.content for token, _ in acting), image_token]))


def list_special_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """What is spelled in characters where people write it, unless it is learned."""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def check_learn_tokens(learn_tokens: Sequence[str], tokenizer: PreTrainedTokenizerFast, *, image_token: str) -> None:
    """Refuses what an answer cannot hold.

    Raises:
        ValueError: no list, no token of this tokenizer, or one that begins, ends or pads texts or stands for an image.
    """
    if isinstance(learn_tokens, str):
        raise ValueError(f"got learn_tokens={learn_tokens!r}; expected a list of tokens; put it into one")
    reserved = {image_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    for token in learn_tokens:
        if not isinstance(token, str) or tokenizer.backend_tokenizer.token_to_id(token) is None:
            raise ValueError(
                f"got {token!r} in learn_tokens, which is no token of the tokenizer; expected tokens that were added: "
                "call processor.tokenizer.add_tokens, and model.resize_token_embeddings"
            )
        if token in reserved:
            raise ValueError(
                f"got {token!r} in learn_tokens; expected tokens that answers are made of; take it out: the template "
                "and the collator write it where it belongs"
            )


def read_tokenizer_state(tokenizer: PreTrainedTokenizerFast) -> tuple[Hashable, ...]:
    """What ids of text depend on, for keys of caches: a tokenizer may change at any time.

    It is read for every prompt, so a vocabulary, which would take as long as to tokenise a page, is read in samples.
    Two changes are not seen: another vocabulary of the same size that differs between the samples, and other flags of
    a token that was added before, where there are more than `_MANY_TOKENS` of them.

    Raises:
        ValueError: the tokenizer is not a fast one.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"got a {type(tokenizer).__name__}; expected a fast tokenizer; load it with AutoTokenizer, or with "
            "load_sentencepiece_tokenizer from a folder with tokenizer.model"
        )
    backend = tokenizer.backend_tokenizer
    pieces = (backend.normalizer, backend.pre_tokenizer)
    num_tokens = backend.get_vocab_size(with_added_tokens=True)
    num_added = num_tokens - backend.get_vocab_size(with_added_tokens=False)
    return (
        num_tokens,
        # All flags in one text. Gemma 3 has 6,200 added tokens, too many to read for every prompt.
        repr(backend.get_added_tokens_decoder()) if num_added <= _MANY_TOKENS else backend.id_to_token(num_tokens - 1),
        *(None if piece is None else piece.__getstate__() for piece in pieces),
        _sample_model(backend.model, backend.get_vocab_size(with_added_tokens=False)),
        tuple(tokenizer.special_tokens_map.items()),
    )


def _sample_model(model: models.Model, size: int) -> tuple[Hashable, ...]:
    settings = tuple(getattr(model, name) for name in _MODEL_SETTINGS[type(model)])
    probes = [model.id_to_token(token_id) for token_id in range(0, size, max(1, size // _NUM_PROBES))]
    ids = ()
    if isinstance(model, models.BPE) and not model.dropout:
        # Merges show in the ids of a text.
        ids = tuple(token.id for token in model.tokenize("".join(filter(None, probes))))
    return (type(model), size, settings, tuple(probes), ids)


@dataclass(frozen=True)
class ControlToken:
    """A literal that becomes one id when a template writes it.

    Args:
        strips_left: The white space before it belongs to it and is not tokenised.
        strips_right: The same for the white space after it.
    """

    content: str
    token_id: int
    strips_left: bool
    strips_right: bool


@lru_cache(maxsize=16)
def _list_acting_tokens(
    tokenizer: PreTrainedTokenizerFast, image_token: str, state: tuple[Hashable, ...]
) -> tuple[tuple[ControlToken, bool], ...]:
    """Added tokens that can be control tokens, and whether each is one whatever a template writes."""
    return tuple(
        (
            ControlToken(token.content, token_id, token.lstrip, token.rstrip),
            token.special or token.content == image_token,
        )
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content == image_token or not _SIGNS.isdisjoint(token.content)
    )


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """Tokenises text without control tokens. Made by `_load_encoder`."""

    control_tokens: dict[str, ControlToken]
    literals: re.Pattern[str]
    forbidden_ids: frozenset[int]
    start: Tokenizer
    inside: Tokenizer

    def encode_text(self, text: str, *, is_start: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, and for each the range of characters that it stands for.

        Args:
            text: Without control tokens; what looks like one is tokenised like any other text.
            is_start: Whether the tokenizer should treat it as the start of a string.

        Raises:
            ValueError: the tokenizer makes a control token out of plain text, whatever its settings.
        """
        encoding = (self.start if is_start else self.inside).encode(text, add_special_tokens=False)
        if not self.forbidden_ids.isdisjoint(encoding.ids):
            tokens = [token for token, id in zip(encoding.tokens, encoding.ids) if id in self.forbidden_ids]
            raise ValueError(
                f"got text that this tokenizer turns into the control tokens {tokens}; expected plain text only; "
                "remove them from the text"
            )
        return encoding.ids, encoding.offsets


def _load_encoder(tokenizer: PreTrainedTokenizerFast, *, image_token: str, prompt: str = "") -> TextEncoder:
    """The encoder that belongs to a tokenizer in its present state. Cached: a large vocabulary takes a second.

    Args:
        tokenizer: Fast; it is not changed.
        image_token: Counts as a control token, whether or not the tokenizer knows it as one.
        prompt: Added tokens with brackets or bars that its template can write, or wrote, are control tokens, too;
            others, such as Gemma's "<table>", are words like any other.

    Raises:
        ValueError: the tokenizer is not a fast one.
    """
    state = read_tokenizer_state(tokenizer)
    template_text = prompt.template_text if isinstance(prompt, Prompt) else ""
    control_tokens, words = _sort_acting_tokens(tokenizer, image_token, state, template_text)
    if words is not None:
        # What this prompt's template put together from pieces in a way that its samples do not show.
        written = {match[0] for span in list_template_spans(prompt) for match in words.finditer(prompt, *span)}
        if written:
            acting = _list_acting_tokens(tokenizer, image_token, state)
            control_tokens += tuple(token for token, _ in acting if token.content in written)
    return _build_encoder(tokenizer, control_tokens, image_token, state)


@lru_cache(maxsize=16)
def _sort_acting_tokens(
    tokenizer: PreTrainedTokenizerFast, image_token: str, state: tuple[Hashable, ...], template_text: str
) -> tuple[tuple[ControlToken, ...], re.Pattern[str] | None]:
    """The control tokens of a template, and what finds the added tokens that are words like any other in it."""
    control_tokens, words = [], []
    for token, is_control in _list_acting_tokens(tokenizer, image_token, state):
        if is_control or token.content in template_text:
            control_tokens.append(token)
        else:
            words.append(token.content)
    return tuple(control_tokens), compile_literals(tuple(words))


@lru_cache(maxsize=4)
def _build_encoder(
    tokenizer: PreTrainedTokenizerFast,
    added_tokens: tuple[ControlToken, ...],
    image_token: str,
    state: tuple[Hashable, ...],
) -> TextEncoder:
    control_tokens = {token.content: token for token in added_tokens}
    literals = compile_literals((*control_tokens, image_token))
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec |= {"truncation": None, "padding": None, "post_processor": None}
    for token in spec["added_tokens"]:
        token["special"] = token["content"] in control_tokens
    if spec["model"]["type"] == "BPE":
        merges = spec["model"]["merges"]
        spec["model"]["merges"] = [merge for merge in merges if "".join(merge) not in control_tokens]
    start = _load_backend(spec)
    # Characters that are not in the vocabulary become the unknown token: a user may type them.
    forbidden_ids = frozenset(token.token_id for token in added_tokens) - {tokenizer.unk_token_id}
    has_first_rule = _forbid_prefix(spec["pre_tokenizer"])
    inside = _load_backend(spec) if has_first_rule else start
    return TextEncoder(control_tokens, literals, forbidden_ids, start, inside)


def _load_backend(spec: dict[str, Any]) -> Tokenizer:
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.encode_special_tokens = True
    return backend


def _forbid_prefix(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Changes the rule "first" to "never" in place; tells whether there was one."""
    if pre_tokenizer is None:
        return False
    if pre_tokenizer["type"] == "Sequence":
        found = [_forbid_prefix(part) for part in pre_tokenizer["pretokenizers"]]
        return any(found)
    if pre_tokenizer["type"] == "Metaspace" and pre_tokenizer["prepend_scheme"] == "first":
        pre_tokenizer["prepend_scheme"] = "never"
        return True
    return False


@dataclass(frozen=True)
class _Piece:
    """A range of a prompt: a control token, or the text after one."""

    start: int
    end: int
    control: ControlToken | None
    follows: ControlToken | None = None


def _split(prompt: str, control_tokens: dict[str, ControlToken], pattern: re.Pattern[str]) -> Iterator[_Piece]:
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
