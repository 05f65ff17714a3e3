"""The check of a data file: what is counted, what is refused and why, in one process and in several."""

import json
import os

import PIL.Image
import pytest

from processing_llava.data import data_check
from processing_llava.data.data_check import RecordCheck, check_sources, find_usable_rows
from processing_llava.data.data_sources import DataSource
from tests.tiny import tiny_processor


def record(*turns: str, **fields) -> dict:
    roles = ("human", "gpt")
    return {**fields, "conversations": [{"from": roles[n % 2], "value": turn} for n, turn in enumerate(turns)]}


@pytest.fixture
def source(tmp_path) -> DataSource:
    """Good records between all kinds of bad ones."""
    PIL.Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    (tmp_path / "text.png").write_text("no picture")
    lines = [
        record("<image>\nWhat?", "A circle.", "Color?", "Red.", id="good", image="red.png"),
        record("Q", "A", id="text only"),
        record("<image>\nWhat?", "A circle.", id="gone", image="gone.png"),
        record("<image>\nWhat?", "A circle.", id="no picture", image="text.png"),
        record("<image>\nWhat?", "A circle.", id="two pictures", image=["red.png", "red.png"]),
        record("Q", "", id="silent"),
        record("Q", id="unanswered"),
        record("Q", "A" * 900, id="long"),
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([*map(json.dumps, lines), "oops"]))
    return DataSource(path=str(path), image_folder=str(tmp_path))


REFUSED = {
    "gone": "missing image",
    "no picture": "unreadable image",
    "two pictures": "images and placeholders differ",
    "silent": "empty answer",
    "unanswered": "nothing to learn",
    "long": "too long",
    "data.jsonl, line 9": "not JSON",
}


def test_what_is_usable_and_what_is_refused(source):
    check = RecordCheck(tiny_processor(), max_length=700)
    report = check_sources([source], check, workers=1)
    assert report.num_records == 9
    assert {refusal.id: refusal.reason for refusal in report.refusals} == REFUSED
    rows = list(find_usable_rows([source], check))
    assert [measured.row["id"] for measured in rows] == ["good", "text only"]
    assert list(report.lengths) == [measured.num_tokens for measured in rows]
    assert report.num_supervised == sum(measured.num_supervised for measured in rows)


def test_the_table_and_the_json_say_the_same(source):
    report = check_sources([source], RecordCheck(tiny_processor(), max_length=700), workers=1)
    table = report.format_table()
    found = json.loads(json.dumps(report.to_dict()))
    assert "usable rows           2\n" in table
    assert "  empty answer        1: silent\n    got an empty answer at position 1 in record 'silent'" in table
    assert (found["records"], found["usable_rows"], found["tokens"]) == (9, 2, sum(report.lengths))
    assert {entry["id"]: entry["reason"] for entry in found["refused"]} == REFUSED
    assert found["length_percentiles"] == {"50": max(report.lengths)} | dict.fromkeys(
        ("90", "99", "100"), max(report.lengths)
    )


def test_first_turns_that_are_left_out_are_counted(tmp_path):
    turns = [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    system = [{"from": "system", "value": "S"}]
    records = [{"conversations": turns}, {"conversations": system + turns}, {"conversations": turns[1:]}]
    (tmp_path / "rows.json").write_text(json.dumps(records))
    report = check_sources([DataSource(path=str(tmp_path / "rows.json"))], RecordCheck(tiny_processor()), workers=1)
    assert report.to_dict()["first_turns_left_out"] == 2
    assert "  first turn left out 2\n" in report.format_table()


def test_long_rows_are_counted(source):
    keep = check_sources([source], RecordCheck(tiny_processor(), max_length=700, too_long="keep"), workers=1)
    assert "  too long, kept      1\n" in keep.format_table()
    split = check_sources([source], RecordCheck(tiny_processor(), max_length=200, too_long="split"), workers=1)
    assert "  part of one too long2\n" in split.format_table().replace(" 2\n", "2\n")
    assert [refusal.id for refusal in split.refusals if "too long" in refusal.reason] == ["long"]


def test_many_ids_of_one_reason_are_shortened(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(record("Q", "", id=number)) for number in range(1000)))
    report = check_sources([DataSource(path=str(path))], RecordCheck(tiny_processor()), workers=1)
    assert "  empty answer        1,000: 0, 1, 2, 3, 4, ...\n" in report.format_table()
    assert "tokens a row, up to   -" in report.format_table()


def test_processes_find_what_one_finds(source, monkeypatch):
    monkeypatch.setattr(data_check, "NUM_CHUNKS_FOR_ONE", 2)
    monkeypatch.setattr(data_check, "CHUNK_SIZE", 2)
    check = RecordCheck(tiny_processor(), max_length=700)
    assert check_sources([source, source], check, workers=2) == check_sources([source, source], check, workers=1)


class KilledWorker:
    """A check during which its process ends, as when memory is short."""

    def __call__(self, record, index, *, image_folder):
        os._exit(9)


def test_a_killed_process_is_one_error(source, monkeypatch):
    monkeypatch.setattr(data_check, "NUM_CHUNKS_FOR_ONE", 1)
    with pytest.raises(ValueError, match="a process that was killed"):
        check_sources([source], KilledWorker(), workers=2)


def test_mistakes_in_options(source):
    with pytest.raises(ValueError, match="got max_length=0"):
        RecordCheck(tiny_processor(), max_length=0)
    with pytest.raises(ValueError, match="got too_long='cut'; expected one of keep, drop, split"):
        RecordCheck(tiny_processor(), too_long="cut")
    with pytest.raises(ValueError, match="got 0 workers"):
        check_sources([source], RecordCheck(tiny_processor()), workers=0)
