"""`tokenizer.model` of an original checkpoint -> a fast tokenizer that gives the ids of SentencePiece itself.

The original LLaVA runs the slow LlamaTokenizer, that is SentencePiece plus a rule about the space in front of a text:
with `legacy` every text and every piece after a special token gets one, without it only the start of a text.

What is surprising:
- SentencePiece merges the pair whose result has the best score, and of equals the leftmost. A fast tokenizer has one
  fixed order of merges, so equal scores need an order that leads to the same end; see `_order_merges`. In practice
  only the pieces made of nothing but spaces share a score.
- Those space pieces have the worst score of all, though their ids are small. Ordered by id, as in transformers'
  own conversion, they come first: "so?  ###" splits into other pieces than the checkpoint was trained with.
- The prefix space is written as a space in one step and turned into U+2581 in the next: the usual single step leaves
  it out in front of a text that already begins with a space.
"""

import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

_SPACE = "\u2581"
MAX_PIECES, MAX_PIECE_LENGTH = 500_000, 256
"""Every way to cut a piece in two is tried. SentencePiece makes none of more than 16 characters unless told to."""
_NAMED_TOKENS = ("unk_token", "bos_token", "eos_token", "pad_token")


def load_sentencepiece_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """A fast tokenizer from `tokenizer.model` and the JSON files beside it, as the slow LlamaTokenizer reads them.

    Tokens of `added_tokens.json` are special whether or not `special_tokens_map.json` lists them, so that nobody can
    type `<im_start>`. In text, U+2581 is a space, as in SentencePiece.

    Args:
        folder: Holds `tokenizer.model`; `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`
            are read if they are there. A missing or null `legacy` means true, as it did when the files were made.

    Raises:
        ValueError: there is no `tokenizer.model`, it is of a kind that no LLaVA uses, or added ids leave a gap.
    """
    folder = Path(folder)
    model = _read_model(folder)
    config = _read_json(folder / "tokenizer_config.json")
    legacy = True if config.get("legacy") is None else config["legacy"]
    named = _read_named_tokens(config, _read_json(folder / "special_tokens_map.json"), model)
    backend = _build_backend(model, prefix_rule="always" if legacy else "first")
    _add_tokens(backend, model, config, _read_json(folder / "added_tokens.json"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        legacy=legacy,
        add_bos_token=config.get("add_bos_token", True),
        add_eos_token=config.get("add_eos_token", False),
        clean_up_tokenization_spaces=False,
        padding_side=config.get("padding_side", "right"),
        model_max_length=config.get("model_max_length", int(1e30)),
        **named,
    )


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _read_model(folder: Path) -> sentencepiece_model.ModelProto:
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise ValueError(
            f"got {folder}; expected a folder with tokenizer.model; use AutoTokenizer for other tokenizers"
        )
    model = sentencepiece_model.ModelProto()
    model.ParseFromString(path.read_bytes())
    longest = max((len(piece.piece) for piece in model.pieces), default=0)
    if len(model.pieces) > MAX_PIECES or longest > MAX_PIECE_LENGTH:
        raise ValueError(
            f"got {path} with {len(model.pieces)} pieces, the longest of {longest} characters; expected at most "
            f"{MAX_PIECES} of at most {MAX_PIECE_LENGTH}: no model needs more, take another one"
        )
    found = {
        "model_type": sentencepiece_model.TrainerSpec.ModelType.Name(model.trainer_spec.model_type),
        "byte_fallback": model.trainer_spec.byte_fallback,
        "treat_whitespace_as_suffix": model.trainer_spec.treat_whitespace_as_suffix,
        "remove_extra_whitespaces": model.normalizer_spec.remove_extra_whitespaces,
        "precompiled_charsmap": bool(model.normalizer_spec.precompiled_charsmap),
    }
    expected = {
        "model_type": "BPE",
        "byte_fallback": True,
        "treat_whitespace_as_suffix": False,
        "remove_extra_whitespaces": False,
        "precompiled_charsmap": False,
    }
    if found != expected:
        raise ValueError(f"got {path} with {found}; expected {expected}; use AutoTokenizer for other kinds")
    return model


def _read_named_tokens(
    config: dict[str, Any], token_map: dict[str, Any], model: sentencepiece_model.ModelProto
) -> dict[str, str]:
    """Contents of the named tokens; `special_tokens_map.json` wins, as in the transformers that wrote it."""
    trainer = model.trainer_spec
    named = {"unk_token": trainer.unk_piece, "bos_token": trainer.bos_piece, "eos_token": trainer.eos_piece}
    for source in (config, token_map):
        for name in _NAMED_TOKENS:
            if source.get(name) is not None:
                named[name] = source[name] if isinstance(source[name], str) else source[name]["content"]
    return named


def _build_backend(model: sentencepiece_model.ModelProto, *, prefix_rule: str) -> Tokenizer:
    vocab = {piece.piece: index for index, piece in enumerate(model.pieces)}
    merges = _order_merges(model)
    unk_piece = model.trainer_spec.unk_piece
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token=unk_piece, fuse_unk=True, byte_fallback=True))
    has_prefix = model.normalizer_spec.add_dummy_prefix
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(" ", prepend_scheme=prefix_rule if has_prefix else "never", split=False),
            pre_tokenizers.Metaspace(_SPACE, prepend_scheme="never", split=False),
        ]
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if has_prefix else []))
    return backend


def _order_merges(model: sentencepiece_model.ModelProto) -> list[tuple[str, str]]:
    """Every way to put an ordinary piece together from two others: best score first, then longest left half.

    The second key stands in for "leftmost". In a run of spaces it lets the piece at the left grow one space at a time
    until no longer piece exists, as SentencePiece does. Between two ways to make one piece that compete for a shared
    middle ("ab" + "a" and "a" + "ba" in "ababa"), the longer left half usually lies further left.
    """
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == piece.NORMAL}
    ranked = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                ranked.append((-score, -cut, piece))
    return [(piece[:-cut], piece[-cut:]) for _, cut, piece in sorted(ranked)]


def _add_tokens(
    backend: Tokenizer, model: sentencepiece_model.ModelProto, config: dict[str, Any], added_tokens: dict[str, int]
) -> None:
    """Makes the control pieces of the model and the tokens of the JSON files known, under their ids."""
    tokens = {
        index: AddedToken(piece.piece, normalized=False, special=piece.type != piece.USER_DEFINED)
        for index, piece in enumerate(model.pieces)
        if piece.type in (piece.UNKNOWN, piece.CONTROL, piece.USER_DEFINED)
    }
    for content, token_id in added_tokens.items():
        tokens[token_id] = AddedToken(content, normalized=False, special=True)
    for token_id, fields in config.get("added_tokens_decoder", {}).items():
        is_special = fields["special"] or fields["content"] in added_tokens
        tokens[int(token_id)] = AddedToken(**{**fields, "special": is_special})
    for token_id, token in sorted(tokens.items()):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != token_id:
            raise ValueError(
                f"got id {token_id} for added token {token.content!r}; expected "
                f"{backend.token_to_id(token.content)}, the next free one; correct added_tokens.json"
            )
