"""JSON lists and JSON Lines: whole, cut into blocks, and broken."""

import json
import pickle

import pytest

from processing_llava.data import json_records
from processing_llava.data.data_bounds import RefusedRecord
from processing_llava.data.json_records import stream_records

RECORDS = [{"id": 1, "text": 'a ] , [ " b'}, {"id": "two", "turns": [[], [{"x": None}]]}, 12, 345, "\u00e9", []]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_lists_are_read_in_blocks_of_any_size(tmp_path, monkeypatch, indent, block):
    monkeypatch.setattr(json_records, "BLOCK_CHARACTERS", block)
    path = tmp_path / "data.json"
    path.write_text(" \n" * (block > 1) + json.dumps(RECORDS, indent=indent) + "\n", encoding="utf-8")
    assert list(stream_records(path)) == RECORDS


def test_a_byte_order_mark_and_an_empty_list(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("[ ]", encoding="utf-8-sig")
    assert list(stream_records(path)) == []


def test_records_of_a_list_come_before_its_end_is_read(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("[1, 2, " + " " * 2**21 + "oops")
    records = stream_records(path)
    assert [next(records), next(records)] == [1, 2]
    with pytest.raises(ValueError, match="no JSON after 2 records, at 'oops'"):
        next(records)


@pytest.mark.parametrize("text", ["[1, 2", "[1 2]", "[1,]", "[", '["a', "[nul]", "[" * 100_000])
def test_broken_lists_are_named(tmp_path, text):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"got .*data\.json, whose list is no JSON after \d records"):
        list(stream_records(path))


def test_a_line_that_is_not_json_is_refused_and_the_next_is_read(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = ['{"id": 1}', "", '{"id": 2', "[" * 100_000, "9" * 5000, '{"id": 3}']
    path.write_text("\n".join(lines))
    records = list(stream_records(path))
    assert [records[0], records[-1]] == [{"id": 1}, {"id": 3}]
    assert [record.record_id for record in records[1:-1]] == [f"data.jsonl, line {number}" for number in (3, 4, 5)]
    assert {record.reason for record in records[1:-1]} == {"not JSON"}


OTHERS = {
    "COCO": {"info": {}, "images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"id": 1, "caption": "A bus."}]},
    "VQA": {"questions": [{"question_id": 1, "image_id": 1, "question": "What?"}], "data_type": "mscoco"},
    "splits": {"train": [{"conversations": []}], "test": []},
    "a wrapped list": {"data": [{"conversations": []}]},
    "by id": {str(number): {"image": "1.jpg"} for number in range(100)},
    "nothing": {},
}


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("name", OTHERS)
def test_one_object_is_no_record_unless_it_holds_a_conversation(tmp_path, name, suffix, indent):
    path = tmp_path / f"data{suffix}"
    path.write_text("\n" + json.dumps(OTHERS[name], indent=indent) + "\n\n")
    keys = ", ".join(map(repr, sorted(OTHERS[name])[:10]))
    with pytest.raises(ValueError, match=f"data{suffix}, which is one JSON object with the keys {keys}; expected a l"):
        list(stream_records(path))
    record = {"conversations": [{"from": "human", "value": "What?"}], **OTHERS[name]}
    path.write_text(json.dumps(record, indent=indent))
    assert list(stream_records(path)) == [record]
    path.write_text(json.dumps(record) + "\n" + json.dumps(OTHERS[name]))
    assert list(stream_records(path)) == [record, OTHERS[name]]


def test_files_that_are_no_text_or_not_there(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        list(stream_records(path))
    with pytest.raises(FileNotFoundError, match="missing.json"):
        list(stream_records(tmp_path / "missing.json"))
    with pytest.raises(FileNotFoundError, match="expected a file"):
        list(stream_records(tmp_path))


def test_refused_records_come_back_from_another_process():
    refused = RefusedRecord("7", "no turns", "no turns", "expected some")
    copy = pickle.loads(pickle.dumps(refused))
    assert (copy.record_id, copy.reason, str(copy)) == ("7", "no turns", "got no turns in record '7'; expected some")
