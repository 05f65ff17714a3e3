"""Rows of every kind of source: their keys and pictures, and what is wrong with a row or with all of them."""

import json
import os
from pathlib import Path

import pytest
from datasets import Dataset, Image
from hypothesis import given
from hypothesis import strategies as st

from modeling_llava.batch.answering import Shard
from modeling_llava.batch.inputs import BatchInput, open_rows
from processing_llava.image_loading import load_image
from tests.conftest import ROOT
from tests.processing_llava.image_encoders import png

NAMES = ("a.png", "b.png", "c d.png")


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for number, name in enumerate(NAMES, start=1):
        (folder / name).write_bytes(png(8, 8 + number))
    (folder / "below" / "e.PNG").write_bytes(png(9, 9))
    return folder


def read(path, **options) -> list:
    return list(open_rows(BatchInput(path=str(path), **options)))


def sizes(rows) -> dict[str, tuple[int, int]]:
    return {row.key: load_image(row.list_pictures()[0]).size for row in rows}


def test_a_folder_gives_its_pictures_by_their_paths_and_names_what_is_left_out(folder, caplog):
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(png(8, 8))
    (folder / ".git").mkdir()
    (folder / "scan.tif").write_bytes(b"II*\0")
    rows = read(folder)
    assert [row.key for row in rows] == ["a.png", "b.png", "c d.png", "scan.tif", "below/e.PNG"]
    assert [row.image for row in rows] == [row.key for row in rows]
    assert sizes(row for row in rows if row.key != "scan.tif")["below/e.PNG"] == (9, 9)
    for what in ("1 files .txt", "1 files that begin with a dot", "1 folders that begin with a dot"):
        assert what in caplog.text


def test_links_of_a_folder_stay_inside_unless_somebody_says_otherwise(folder, tmp_path, caplog):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(png(8, 30))
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "linked").symlink_to(outside)
    (folder / "below" / "loop").symlink_to(folder)
    rows = {row.key: row for row in read(folder)}
    assert "linked/secret.png" not in rows and "2 links to folders" in caplog.text
    with pytest.raises(ValueError, match="record 'link.png'; correct the record"):
        rows["link.png"].list_pictures()
    rows = {row.key: row for row in read(folder, follow_links=True)}
    assert sizes([rows["link.png"], rows["linked/secret.png"]]) == dict.fromkeys(
        ("link.png", "linked/secret.png"), (8, 30)
    )
    assert "below/loop/a.png" not in rows and "1 links to a folder above" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="file names of bytes")
def test_names_that_are_no_unicode_are_keys_of_text(folder):
    path = os.path.join(os.fsencode(folder), b"caf\xe9.png")
    with open(path, "wb") as file:
        file.write(png(8, 21))
    (row,) = (row for row in read(folder) if row.key.startswith("caf"))
    assert row.key == "caf\\udce9.png" == row.image
    assert sizes([row]) == {row.key: (8, 21)}


RECORDS = [{"id": number, "image": name, "question": f"What is {name}?"} for number, name in enumerate(NAMES)]
WRITERS = {
    "rows.jsonl": lambda records: "".join(json.dumps(record) + "\n\n" for record in records),
    "rows.json": json.dumps,
    "comma.csv": lambda records: write_csv(records, ","),
    "semicolon.csv": lambda records: "\ufeff" + write_csv(records, ";").replace("\n", "\r\n"),
    "tab.tsv": lambda records: write_csv(records, "\t"),
}


def write_csv(records, delimiter) -> str:
    lines = [list(records[0]), *(map(str, record.values()) for record in records)]
    return "".join(delimiter.join(f'"{value}"' for value in line) + "\n" for line in lines)


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_rows(name, folder):
    (folder / name).write_bytes(WRITERS[name](RECORDS).encode())
    rows = read(folder / name, asks=True)
    assert [row.key for row in rows] == ["0", "1", "2"]
    assert [row.question for row in rows] == [record["question"] for record in RECORDS]
    assert sizes(rows) == {"0": (8, 9), "1": (8, 10), "2": (8, 11)}
    other = {"key_column": "image", "question_column": "id", "image_column": "image"}
    assert [row.key for row in read(folder / name, asks=True, **other)] == list(NAMES)


def test_a_file_of_one_row_is_one_row(folder):
    for name in ("one.jsonl", "one.json"):
        (folder / name).write_text(json.dumps(RECORDS[0]) + "\n")
        assert len(read(folder / name)) == 1


@pytest.mark.parametrize("kind", ["parquet", "saved", "streaming", "folder of parquet"])
def test_parquet_and_datasets_bring_their_pictures_along(kind, folder, tmp_path):
    pictures = [{"bytes": (folder / name).read_bytes(), "path": None} for name in NAMES]
    data = Dataset.from_dict({"image": pictures, "id": list("xyz")}).cast_column("image", Image())
    path = tmp_path / ("rows.parquet" if kind == "parquet" else "data")
    if kind == "saved":
        data.save_to_disk(path)
    else:
        path.parent.mkdir(exist_ok=True)
        if kind != "parquet":
            path.mkdir()
        data.to_parquet(path if kind == "parquet" else path / "train.parquet")
    rows = read(path, streaming=kind == "streaming")
    assert sizes(rows) == {"x": (8, 9), "y": (8, 10), "z": (8, 11)}
    assert [row.image for row in rows] == [None] * 3


def test_wrong_rows_are_rows_of_their_own(folder):
    lines = [
        json.dumps(RECORDS[0]), "{broken", "7", json.dumps({"id": "n"}), json.dumps({"id": "m", "image": None}),
        json.dumps({"image": "../outside.png"}), json.dumps({"id": "u", "image": "https://example.org/a.png"}),
        json.dumps({"id": "d", "image": [["a.png"]] * 2}), json.dumps({"id": "t", "image": "a.png", "x": "y" * 2**21}),
        json.dumps({"id": "\ud800", "image": 5}),
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(lines))
    rows = read(folder / "rows.jsonl")
    assert [row.key for row in rows] == [
        "0", "rows.jsonl, line 2", "row 3", "n", "m", "row 6", "u", "d", "row 9", "\\ud800",
    ]  # fmt: skip
    for row in rows:
        if row.key not in ("0", "d"):
            with pytest.raises(ValueError, match="expected|got no picture"):
                row.list_pictures()
    assert rows[7].image == ["a.png", "a.png"] or len(rows[7].list_pictures()) == 2


def test_a_line_of_csv_with_other_columns_is_one_row_with_an_error(folder):
    (folder / "rows.csv").write_text("id,image\n1,a.png\n2\n3,b.png,more\n4,b.png\n")
    rows = read(folder / "rows.csv")
    assert [row.key for row in rows] == ["1", "rows.csv, line 3", "rows.csv, line 4", "4"]
    with pytest.raises(ValueError, match="got 3 values for 2 columns"):
        rows[2].list_pictures()


WRONG = {
    "twice.jsonl": ('{"id": 1, "image": "a.png"}\n{"id": "1", "image": "b.png"}', "the key '1' again in row 2 of"),
    "columns.csv": ("picture,id\na.png,1\n", "with the columns 'picture', 'id'; expected image or images"),
    "twice.csv": ("image,image\na.png,b.png\n", "first line has a column twice"),
    "quotes.csv": ('image\n"a.png" b\n', "quotes.csv, line 2"),
    "unclosed.csv": ('image\n"a.png\n' + "b.png\n" * 50_000, "unclosed.csv, line"),
    "latin.csv": ("image\ncaf\xe9.png\n".encode("latin-1"), "is not UTF-8"),
    "latin.jsonl": ('{"image": "caf\xe9.png"}'.encode("latin-1"), "is not UTF-8"),
    "list.json": ('[{"image": "a.png"}, {"im', "no JSON after 1 records"),
    "empty.csv": ("image\n", "without a row"),
    "empty.jsonl": ("", "without a row"),
    "rows.txt": ("a.png\n", "expected a folder of pictures, or a file that ends in .csv"),
    "broken.parquet": ("PAR1", "no whole file of Parquet"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_error_that_names_it(name, folder):
    content, message = WRONG[name]
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        read(folder / name)
    assert name in str(error.value)


def test_what_is_not_there_or_holds_nothing_is_one_error(folder, tmp_path):
    for name in ("missing.csv", "missing.jsonl", str(tmp_path / "missing"), "./missing/"):
        with pytest.raises(FileNotFoundError, match="which is not there; expected a folder of pictures"):
            read(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="without a row"):
        read(tmp_path / "empty")
    with pytest.raises(ValueError, match="expected --question, --questions or --task"):
        read(folder, asks=True)
    with pytest.raises(ValueError, match="got --streaming"):
        read(folder, streaming=True)
    with pytest.raises(ValueError, match="expected them|--split"):
        read(folder, split="test")


@pytest.mark.parametrize("option", ["key_column", "image_column", "question_column"])
def test_columns_that_are_named_have_to_be_there(option, folder):
    (folder / "rows.jsonl").write_text(json.dumps(RECORDS[0]))
    with pytest.raises(ValueError, match=f"expected nowhere; name another one with --{option.replace('_', '-')}"):
        read(folder / "rows.jsonl", **{option: "nowhere"})


def test_a_question_that_is_not_asked_is_one_line(folder, caplog):
    (folder / "rows.jsonl").write_text(json.dumps(RECORDS[0]))
    read(folder / "rows.jsonl")
    assert "the column 'question' is not used" in caplog.text


@given(st.lists(st.text(), max_size=50), st.integers(1, 9))
def test_shards_never_share_a_row_and_leave_none_out(keys, total):
    for key in keys:
        key = key.encode("utf-8", "backslashreplace").decode()
        assert sum(Shard(number, total).takes(key) for number in range(1, total + 1)) == 1


def test_shards_are_of_like_size_and_stay_the_same():
    counts = [sum(Shard(number, 4).takes(f"{key}.png") for key in range(4000)) for number in range(1, 5)]
    assert sum(counts) == 4000 and min(counts) > 900
    # Machines with other versions have to agree.
    assert [key for key in range(20) if Shard(1, 4).takes(f"{key}.png")] == [3, 12, 15, 16, 18]
    for text in ("0/4", "5/4", "1", "a/b", "1/0", "-1/4", ""):
        with pytest.raises(ValueError, match="expected I/N"):
            Shard.read(text)


def test_the_examples_are_read():
    assert len(read(ROOT / "spaces_demo" / "examples")) == 11
