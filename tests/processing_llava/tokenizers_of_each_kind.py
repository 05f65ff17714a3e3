"""Small tokenizers of the kinds that LLaVA models use, each with the control tokens of every template."""

import copy
import shutil
import tempfile
from functools import cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from processing_llava.original.sentencepiece_tokenizer import load_sentencepiece_tokenizer
from tests.conftest import GOLDENS

CONTROL_TOKENS = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    *("[INST]", "[/INST]", "<im_start>", "<im_end>", "<image>"),
)
_TRAINING_TEXT = ["USER: What is this? ASSISTANT: It is a red circle on a table.", "</s> <image> [INST]"] * 8


def _add_control_tokens(tokenizer: PreTrainedTokenizerFast, *, special: bool) -> PreTrainedTokenizerFast:
    # Phi-3 declares <|end|> so that the line break after it is no token.
    tokens = [AddedToken(token, normalized=False, rstrip=token == "<|end|>") for token in CONTROL_TOKENS]
    tokenizer.add_tokens(tokens, special_tokens=special)
    return tokenizer


@cache
def load_sentencepiece(*, legacy: bool) -> PreTrainedTokenizerFast:
    """The tokenizer of the reference outputs, without control tokens of other families."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(GOLDENS / "tokenizer.model", folder)
        config = f'{{"legacy": {str(legacy).lower()}}}'
        (Path(folder) / "tokenizer_config.json").write_text(config, encoding="utf-8")
        return load_sentencepiece_tokenizer(folder)


def _train_byte_level(*, has_bos: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(_TRAINING_TEXT, trainer)
    backend.add_special_tokens(["<|begin_of_text|>"])
    if has_bos:
        bos_id = backend.token_to_id("<|begin_of_text|>")
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(
                    single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos_id)]
                ),
            ]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin_of_text|>" if has_bos else None)


def _train_like_qwen() -> PreTrainedTokenizerFast:
    """Splits by a pattern, normalises Unicode, and ends answers with a token that it also pads with."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    pattern = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(_TRAINING_TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _build_with_merges_to_control_tokens() -> PreTrainedTokenizerFast:
    """Like Gemma: spaces are replaced, nothing is put in front. Unlike it, merges spell out "</s>" and "<image>"."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [*"abcdefghijklmnopqrstuvwxyz<>/\u2581", "</", "</s", "<i", "<im", "<ima", "<imag", "<image"]
    vocab = {token: index for index, token in enumerate(["<unk>", "</s>", "<image>", *byte_tokens, *pieces])}
    merges = [("<", "/"), ("</", "s"), ("</s", ">"), ("<", "i"), ("<i", "m"), ("<im", "a"), ("<ima", "g")]
    merges += [("<imag", "e"), ("<image", ">")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken("<image>", normalized=False, special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


NOT_SPECIAL = "not-special"
"""Whoever trained it added its control tokens like words, by `add_tokens` alone."""
_BUILDERS = {
    "sentencepiece": lambda: copy.deepcopy(load_sentencepiece(legacy=False)),
    "sentencepiece-legacy": lambda: copy.deepcopy(load_sentencepiece(legacy=True)),
    "byte-level": lambda: _train_byte_level(has_bos=False),
    "byte-level-bos": lambda: _train_byte_level(has_bos=True),
    "spaces-replaced": _build_with_merges_to_control_tokens,
    "normalised": _train_like_qwen,
    NOT_SPECIAL: lambda: _train_byte_level(has_bos=False),
}
KINDS = tuple(_BUILDERS)


@cache
def load_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One tokenizer for each of `KINDS`."""
    return _add_control_tokens(_BUILDERS[kind](), special=kind != NOT_SPECIAL)
