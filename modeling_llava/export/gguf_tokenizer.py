"""A fast tokenizer as llama.cpp reads it: two kinds, SentencePiece's and byte-level BPE.

What is surprising:
- llama.cpp merges pieces of the first kind by their scores, as SentencePiece does, and knows no list of merges. A
  fast tokenizer has the list and no scores: the score of a piece is its place in it. That is the same only if the list
  holds every way to put a piece together, which is checked.
- The second kind is split into words by a pattern, and llama.cpp knows patterns by names. A pattern that it has no
  name for is refused, since other words give other ids.
- `list_tokenizer_notices` has what llama.cpp does otherwise: it puts the space of SentencePiece after every special
  token, and normalises no Unicode.
"""

import json
from collections.abc import Iterator
from itertools import chain
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerFast

_SPACE = "\u2581"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    _SHORT_FORMS + _WORDS % "": ("qwen2", False),
    _SHORT_FORMS + _WORDS % "{1,3}": ("llama-bpe", True),
}
"""Patterns of words, llama.cpp's name of each, and whether whole words of the vocabulary need no merges there
(llama.cpp b11549, src/llama-vocab.cpp)."""
_STEPS = (
    {"type": "Prepend", "prepend": _SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    {"type": "Metaspace", "split": False},
    {"type": "Split", "pattern": {"String": " "}},
)
"""What may come before the pieces of SentencePiece. Where it puts a space is found out with `_probe_prefix`."""
_ENDS = ("eos", "eot", "eom")
"""Names of the tokens that end an answer."""
_LOWEST = -1e6
"""Score of a piece that nothing is merged to."""


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, generation_config: GenerationConfig) -> None:
    """Refuse a tokenizer for which llama.cpp would give other ids, or more ends of answers than it has places.

    Raises:
        ValueError: naming the part of tokenizer.json.
    """
    ends = _list_ends(tokenizer, generation_config)
    if len(ends) > len(_ENDS):
        raise ValueError(
            f"got eos_token_id={ends}; expected at most {len(_ENDS)}, as GGUF has: correct generation_config.json"
        )
    spec = _read_spec(tokenizer)
    model = spec["model"]
    if model["type"] != "BPE":
        raise _refusal("model.type", model["type"], "BPE")
    for token in spec["added_tokens"]:
        stripped = [name for name in ("lstrip", "rstrip", "single_word") if token[name]]
        if stripped:
            raise _refusal(f"{stripped[0]} of the token {token['content']!r}", True, "false")
    if model["byte_fallback"]:
        _check_pieces(spec)
    else:
        _name_words(spec)


def list_tokenizer_notices(tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """What llama.cpp does otherwise than this package with texts."""
    spec = _read_spec(tokenizer)
    yield (
        "a server of llama.cpp reads a rendered prompt whole: what a user types, such as an end token, acts as a "
        "control token there"
    )
    special = next((token["content"] for token in spec["added_tokens"] if token["special"]), "")
    has_prefix = spec["model"]["byte_fallback"] and _probe_prefix(tokenizer)
    if has_prefix and not _probe_prefix(tokenizer, behind=special):
        yield "llama.cpp puts a space before text behind a special token, such as a second question; here is none"
    if spec["normalizer"] is not None and spec["normalizer"]["type"] == "NFC":
        yield "llama.cpp does not compose Unicode (NFC): letters typed with separate accents get other ids"


def add_tokenizer(
    writer: Any, tokenizer: PreTrainedTokenizerFast, generation_config: GenerationConfig, *, vocab_size: int
) -> None:
    """Write a tokenizer that `check_tokenizer` accepts.

    Args:
        writer: `gguf.GGUFWriter`.
        tokenizer: Its tokens from `vocab_size` on, which have no embedding, are left out.
        generation_config: Says which tokens end an answer.
        vocab_size: Number of embeddings.
    """
    spec = _read_spec(tokenizer)
    tokens, kinds = _list_tokens(spec, vocab_size=vocab_size)
    if spec["model"]["byte_fallback"]:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        places = _rank_pieces(spec)
        writer.add_token_list(tokens)
        writer.add_token_scores([float(places.get(token, _LOWEST)) for token in tokens])
        writer.add_add_space_prefix(_probe_prefix(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_name_words(spec))
        writer.add_token_list(tokens)
        # As in `prompt_ids.py`: nothing that is typed is put together to a control token.
        special = {token["content"] for token in spec["added_tokens"] if token["special"]}
        writer.add_token_merges(
            [" ".join(merge) for merge in spec["model"]["merges"] if "".join(merge) not in special]
        )
        writer.add_add_space_prefix(False)
    writer.add_token_types(kinds)
    first = tokenizer.encode("")[:1]
    writer.add_add_bos_token(bool(first) and first == [tokenizer.bos_token_id])
    writer.add_add_eos_token(False)
    named = {"bos": tokenizer.bos_token_id, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    for name, token_id in (named | dict(zip(_ENDS, _list_ends(tokenizer, generation_config)))).items():
        if token_id is not None and token_id < vocab_size:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)


def _list_ends(tokenizer: PreTrainedTokenizerFast, generation_config: GenerationConfig) -> list[int]:
    ends = generation_config.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [tokenizer.eos_token_id])


def _read_spec(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] == "BPE":
        merges = spec["model"]["merges"]
        spec["model"]["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return spec


def _list_tokens(spec: dict[str, Any], *, vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and kind of every id that has an embedding."""
    from gguf import TokenType

    has_bytes = spec["model"]["byte_fallback"]
    bytes_of_text = {f"<0x{byte:02X}>" for byte in range(256)} if has_bytes else set()
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [int(TokenType.UNUSED)] * vocab_size
    for token, index in spec["model"]["vocab"].items():
        if index < vocab_size:
            tokens[index] = token
            kinds[index] = int(TokenType.BYTE if token in bytes_of_text else TokenType.NORMAL)
    for token in spec["added_tokens"]:
        if token["id"] < vocab_size:
            tokens[token["id"]] = token["content"]
            is_unknown = has_bytes and token["content"] == spec["model"]["unk_token"]
            special = TokenType.UNKNOWN if is_unknown else TokenType.CONTROL
            kinds[token["id"]] = int(special if token["special"] else TokenType.USER_DEFINED)
    return tokens, kinds


def _check_pieces(spec: dict[str, Any]) -> None:
    for part in ("normalizer", "pre_tokenizer"):
        for step in _list_steps(spec[part]):
            if not any(known.items() <= step.items() for known in _STEPS):
                raise _refusal(part, step, "only what turns spaces into pieces")
    merges = spec["model"]["merges"]
    known = {tuple(merge) for merge in merges}
    added = {token["content"] for token in spec["added_tokens"]}
    pieces = spec["model"]["vocab"].keys() - added - {f"<0x{byte:02X}>" for byte in range(256)}
    for piece in pieces | added:
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        for left, right in cuts:
            if left not in pieces or right not in pieces:
                continue
            if piece in added:
                # llama.cpp would make the token of text that anybody typed.
                raise _refusal("model.vocab", f"{left!r} and {right!r}", f"no pieces that add up to {piece!r}")
            if (left, right) not in known:
                raise _refusal("model.merges", f"none of {left!r} and {right!r}", "one, since both are pieces")


def _rank_pieces(spec: dict[str, Any]) -> dict[str, int]:
    """The score of each piece that something is merged to."""
    places: dict[str, int] = {}
    for place, merge in enumerate(spec["model"]["merges"]):
        places.setdefault("".join(merge), -place)
    return places


def _list_steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, one after the other."""
    if part is None:
        return []
    inner = part.get("normalizers", part.get("pretokenizers"))
    return [part] if inner is None else list(chain.from_iterable(map(_list_steps, inner)))


def _probe_prefix(tokenizer: PreTrainedTokenizerFast, *, behind: str = "") -> bool:
    """Whether a text gets a space in front: at the start, or behind a special token."""
    ids = tokenizer.encode(f"{behind}a", add_special_tokens=False)
    return tokenizer.convert_ids_to_tokens(ids)[len(behind) > 0].startswith(_SPACE)


def _name_words(spec: dict[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits texts into words.

    Raises:
        ValueError: if it has none.
    """
    normalizer = spec["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _refusal("normalizer", normalizer["type"], "NFC or none")
    steps = _list_steps(spec["pre_tokenizer"])
    byte_level = steps[-1] if steps else None
    if byte_level is None or byte_level["type"] != "ByteLevel" or byte_level["add_prefix_space"]:
        raise _refusal("pre_tokenizer", byte_level, "ByteLevel without add_prefix_space")
    name, ignores_merges = None, False
    if len(steps) == 1 and byte_level["use_regex"]:
        name = "gpt-2"
    elif len(steps) == 2 and steps[0]["type"] == "Split" and not byte_level["use_regex"]:
        pattern = steps[0]["pattern"].get("Regex")
        if steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
            name, ignores_merges = PATTERNS.get(pattern, (None, False))
    if name is None:
        raise _refusal("pre_tokenizer", steps[0], "a pattern of GPT-2, Qwen 2 or Llama 3")
    if bool(spec["model"]["ignore_merges"]) != ignores_merges:
        raise _refusal("model.ignore_merges", spec["model"]["ignore_merges"], str(ignores_merges))
    return name


def _refusal(part: str, found: Any, expected: str) -> ValueError:
    return ValueError(
        f"got a tokenizer with {part}: {found}, which llama.cpp does not have; expected {expected}: choose another "
        "layout"
    )
