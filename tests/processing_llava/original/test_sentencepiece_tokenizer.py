"""The fast tokenizer against SentencePiece itself, and against the slow tokenizer's rule about the first space."""

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from processing_llava.original.sentencepiece_tokenizer import load_sentencepiece_tokenizer
from tests.conftest import GOLDENS
from tests.processing_llava.tokenizers_of_each_kind import load_sentencepiece

REFERENCE = sentencepiece.SentencePieceProcessor(str(GOLDENS / "tokenizer.model"))
SNIPPETS = (
    *(" ", "  ", "   ", "     ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200d", "\x00", "\u2581"),
    *("a", "an", "ana", "na", "ss", "xx", "the ", " of", "ing", "A", "AA", "USER:", "###", "##", "=", "==", "--"),
    *("....", "0", "00", "12", "3.14", "def ", "self.", ")", "((", "{}", '"', "'", "<", ">", "</", "//", "\\", "_"),
    *("\u00e9", "\u0436", "\u043f\u0440\u0438\u0432\u0435\u0442", "\u4e2d\u56fd", "\u65e5\u672c", "\u0e01", "\u0939"),
    *("\U0001f642", "\U0001f469\u200d\U0001f467", "\ufb01", "\ue000", "\U0010fffd", "http://", "@", "|", "\u03a9"),
)
CONTROL_PIECES = ("<s>", "</s>", "<unk>")


def reference_ids(text: str) -> list[int]:
    return REFERENCE.encode(text)


def fast_ids(text: str, *, legacy: bool = False) -> list[int]:
    return load_sentencepiece(legacy=legacy).encode(text, add_special_tokens=False)


def without_control_pieces(text: str) -> str:
    # SentencePiece reads these as text, a tokenizer as control tokens: that is not compared here.
    for piece in CONTROL_PIECES:
        text = text.replace(piece, "")
    return text


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=5), max_size=20).map("".join))
def test_ids_equal_sentencepiece(text):
    text = without_control_pieces(text)
    assert fast_ids(text) == reference_ids(text)


def test_ids_equal_sentencepiece_on_long_texts():
    generator = random.Random(0)
    for _ in range(2000):
        text = without_control_pieces("".join(generator.choices(SNIPPETS, k=60)))
        assert fast_ids(text) == reference_ids(text)


@pytest.mark.parametrize("after", ["", "a", "\u0436", "\n", "###"])
@pytest.mark.parametrize("before", ["", "b", "?", "1"])
def test_runs_of_spaces_equal_sentencepiece(before, after):
    for length in range(1, 100):
        text = before + " " * length + after
        assert fast_ids(text) == reference_ids(text)


def test_two_spaces_before_a_word_are_not_merged_first():
    # Merges ordered by id give ["so", "?", two spaces, "###"] here.
    tokenizer = load_sentencepiece(legacy=False)
    assert tokenizer.tokenize("so?  ###") == ["\u2581so", "?", "\u2581", "\u2581###"]


@pytest.mark.parametrize("legacy", [False, True])
def test_the_rule_about_spaces_after_control_tokens(legacy):
    tokenizer = load_sentencepiece(legacy=legacy)
    first, second = tokenizer.tokenize("hi</s>hi"), tokenizer.tokenize("hi</s> hi")
    assert first == ["\u2581hi", "</s>", "\u2581hi" if legacy else "hi"]
    assert second == ["\u2581hi", "</s>", *(["\u2581", "\u2581hi"] if legacy else ["\u2581hi"])]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=5), max_size=10).map("".join))
def test_decoding_gives_the_text_back(text):
    text = without_control_pieces(text).replace("\u2581", " ")
    tokenizer = load_sentencepiece(legacy=False)
    assert tokenizer.decode(fast_ids(text), clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("legacy", [False, True])
def test_a_saved_tokenizer_gives_the_same_ids(tmp_path, legacy):
    tokenizer = load_sentencepiece(legacy=legacy)
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("What is it?", "  two spaces", "so?  ###", "a</s>b</s> c", "x" + " " * 23 + "y"):
        assert reloaded.encode(text) == tokenizer.encode(text)


def write_folder(folder: Path, **files: dict) -> Path:
    shutil.copy(GOLDENS / "tokenizer.model", folder)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_json_files_are_read(tmp_path):
    tokenizer = load_sentencepiece_tokenizer(
        write_folder(
            tmp_path,
            tokenizer_config={"legacy": False, "add_bos_token": False, "model_max_length": 2048, "pad_token": "<s>"},
            special_tokens_map={"pad_token": {"content": "<unk>"}, "eos_token": "</s>"},
            added_tokens={"<im_end>": 32001, "<im_start>": 32000},
        )
    )
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<unk>", "</s>", "<s>")
    assert tokenizer.model_max_length == 2048
    assert tokenizer.encode("<im_start>hi<im_end>")[::2] == [32000, 32001]
    assert tokenizer.added_tokens_decoder[32000].special


def test_declared_fields_of_added_tokens_are_kept(tmp_path):
    declared = {"content": "<end>", "lstrip": False, "rstrip": True, "normalized": False, "single_word": False}
    folder = write_folder(
        tmp_path, tokenizer_config={"added_tokens_decoder": {"32000": {**declared, "special": False}}}
    )
    token = load_sentencepiece_tokenizer(folder).added_tokens_decoder[32000]
    assert (token.content, token.rstrip, token.special) == ("<end>", True, False)


@pytest.mark.parametrize("config", [{}, {"legacy": None}])
def test_legacy_is_the_default_of_old_files(tmp_path, config):
    tokenizer = load_sentencepiece_tokenizer(write_folder(tmp_path, tokenizer_config=config))
    assert tokenizer.tokenize("</s>hi") == ["</s>", "\u2581hi"]


def test_bos_is_put_in_front(tmp_path):
    assert load_sentencepiece_tokenizer(write_folder(tmp_path)).encode("hi")[0] == REFERENCE.bos_id()


def test_a_gap_in_added_ids_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got id 32005 for added token '<im_end>'; expected 32000"):
        load_sentencepiece_tokenizer(write_folder(tmp_path, added_tokens={"<im_end>": 32005}))


def test_a_folder_without_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a folder with tokenizer\.model"):
        load_sentencepiece_tokenizer(tmp_path)


def test_other_kinds_of_models_are_refused(tmp_path):
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((GOLDENS / "tokenizer.model").read_bytes())
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.ModelType.UNIGRAM
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="'model_type': 'UNIGRAM'"):
        load_sentencepiece_tokenizer(tmp_path)
