"""What a checkpoint says of `generate` is obeyed where it has a place, and else left out with a line or refused."""

import logging

import pytest

from modeling_llava import AutoModelForVision2Seq
from modeling_llava.checkpoints.generation_settings import ID_FIELDS
from tests.modeling_llava.checkpoints.folder_changes import LAYOUTS, change_json

WHOLE = ("any_llava", "llava", "original")


@pytest.fixture(params=WHOLE)
def folder(request, tmp_path):
    LAYOUTS[request.param](tmp_path)
    return tmp_path / "model"


def load(folder, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="transformers"):
        settings = AutoModelForVision2Seq.from_pretrained(folder).generation_config
    return settings, [record.message for record in caplog.records if "are left out" in record.message]


def test_what_has_a_place_stays(folder, caplog):
    given = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "max_length": 99, "pad_token_id": 3}
    given |= {"suppress_tokens": [5, 6], "bad_words_ids": [[7, 8]], "repetition_penalty": 1.1}
    change_json(folder, "generation_config.json", **given)
    settings, lines = load(folder, caplog)
    assert {name: getattr(settings, name) for name in given} == given
    assert lines == []


def test_token_ids_outside_of_the_vocabulary_are_left_out(folder, caplog):
    ids = {name: [5, 10**6 + 1] if name.endswith("tokens") else 10**6 for name in ID_FIELDS if name != "eos_token_id"}
    ids["eos_token_id"] = [2, 10**6]
    change_json(folder, "generation_config.json", **ids, bad_words_ids=[[10**6], [4]])
    settings, (line,) = load(folder, caplog)
    assert settings.suppress_tokens == settings.begin_suppress_tokens == [5]
    assert settings.bad_words_ids == [[4]]
    assert 2 in settings.eos_token_id and 10**6 not in settings.eos_token_id
    assert settings.pad_token_id is settings.forced_eos_token_id is settings.bos_token_id is None
    assert all(name in line for name in (*ID_FIELDS, "bad_words_ids"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cache_implementation", "static"),
        ("stop_strings", ["a"]),
        ("dola_layers", "low"),
    ],
)
def test_what_a_checkpoint_does_not_choose_is_left_out(field, value, folder, caplog):
    change_json(folder, "generation_config.json", **{field: value})
    settings, lines = load(folder, caplog)
    assert getattr(settings, field) is None
    assert len(lines) == 1 and field in lines[0]


@pytest.mark.parametrize("filename", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token_id", "a"), ("eos_token_id", 1.5), ("pad_token_id", -2), ("forced_eos_token_id", 10**9),
        ("suppress_tokens", [[1]]), ("num_beams", 10**6), ("num_return_sequences", 0), ("max_length", 10**12),
        ("temperature", "x"), ("top_p", 2), ("top_k", 1.5), ("do_sample", 1), ("repetition_penalty", float("inf")),
    ],
)  # fmt: skip
def test_values_that_no_model_has_are_refused(field, value, filename, folder):
    change_json(folder, filename, **{field: value})
    with pytest.raises(ValueError, match=rf"^got {field}=[^\n]* in [^\n]*{filename}; expected "):
        AutoModelForVision2Seq.from_pretrained(folder)
