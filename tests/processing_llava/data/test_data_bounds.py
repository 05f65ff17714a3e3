"""Small files that stand for much: each is refused in one line, within two seconds and 300 MB of its own process."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from processing_llava.data.data_bounds import (
    MOST_LEVELS,
    MOST_TEXT_CHARACTERS,
    RefusedRecord,
    check_parquet,
    find_excess,
)
from processing_llava.data.data_sources import DataSource, open_records
from processing_llava.data.row_datasets import load_rows
from tests.conftest import ROOT

TURNS = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
READ = """
import json, os, resource, sys, time
import datasets, pyarrow.parquet
from processing_llava.data.data_bounds import RefusedRecord
from processing_llava.data.data_sources import DataSource, open_records
from processing_llava.data.row_datasets import load_rows

def read(path, door):
    try:
        if door == "train":
            load_rows([DataSource(path=path)])
        for record in open_records(DataSource(path=path))[1] if door == "check" else ():
            if isinstance(record, RefusedRecord):
                raise record
        return "read"
    except ValueError as error:
        return " ".join(str(error).split())

datasets.disable_progress_bars()
for path in sys.argv[2:]:
    for door in ("train", "check"):
        if os.fork():
            os.wait()
            continue
        datasets.config.HF_DATASETS_CACHE = sys.argv[1]
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        message = read(path, door)
        seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps([path, door, message, seconds, (peak - before) / 1e3]), flush=True)
        os._exit(0)
"""
"""Each file at the door of training and at that of checking, each in a process of its own."""


def nest(depth: int, opening: str, middle: str, closing: str) -> str:
    return opening * depth + middle + closing * depth


def record_of(text: str) -> str:
    return json.dumps({"conversations": [TURNS[0], {"from": "gpt", "value": text}]})


TEXTS = {
    "long.json": lambda: f"[{record_of('x' * 30_000_000)}]",
    "long.jsonl": lambda: record_of("x" * 30_000_000),
    "words.jsonl": lambda: record_of("a word " * 600_000),
    "wide.json": lambda: f"[{record_of(chr(0x1F600) * 8)[:-1]}, {'[1],' * 6_000_000}0]",
    "half.json": lambda: '[{"conversations": [' + '{"from": "human", "value": "Q"},' * 900_000,
    "object.json": lambda: "{\n" + '"a": [1, 2],\n' * 2_500_000,
    "deep.json": lambda: f'[{{"conversations": {nest(900, "[", "1", "]")}}}]',
    "deep.jsonl": lambda: f'{{"conversations": {nest(200, "[", "1", "]")}}}',
    "objects.jsonl": lambda: f'{{"conversations": {nest(400, chr(123) + chr(34) + "a" + chr(34) + ":", "1", "}")}}}',
    "brackets.json": lambda: "[" * 10_000_000,
    "brackets.jsonl": lambda: "[" * 30_000_000,
}


def write_repeated(path, value, count: int, **settings) -> None:
    table = pyarrow.table({"messages": pyarrow.array([[{"role": "user", "content": value}]])})
    with pyarrow.parquet.ParquetWriter(path, table.schema, **settings) as writer:
        for start in range(0, count, 100):
            writer.write_table(pyarrow.concat_tables([table] * min(100, count - start)))


PARQUET = {
    "dictionary": lambda path: write_repeated(path, "x" * 1_000_000, 400, dictionary_pagesize_limit=10**8),
    "plain": lambda path: write_repeated(path, "x" * 1_000_000, 400, use_dictionary=False, compression="zstd"),
    "one group": lambda path: pyarrow.parquet.write_table(
        pyarrow.table({"content": pyarrow.DictionaryArray.from_arrays([0] * 5000, ["x" * 1_000_000])}),
        path,
        dictionary_pagesize_limit=10**8,
    ),
    "numbers": lambda path: pyarrow.parquet.write_table(pyarrow.table({"id": np.zeros(40_000_000, np.int8)}), path),
}


@pytest.fixture(scope="module")
def costs(tmp_path_factory) -> dict[tuple[str, str], list]:
    """What each file costs at each door: message, seconds of the CPU, megabytes."""
    folder = tmp_path_factory.mktemp("bounds")
    for name, make in TEXTS.items():
        (folder / name).write_text(make())
    for name, make in PARQUET.items():
        make(folder / f"{name}.parquet")
        assert (folder / f"{name}.parquet").stat().st_size < 4e6
        (folder / name).mkdir()
        (folder / name / "rows.parquet").hardlink_to(folder / f"{name}.parquet")
    paths = [*TEXTS, *(f"{name}.parquet" for name in PARQUET), *PARQUET]
    command = [sys.executable, "-c", READ, str(folder / "cache"), *(str(folder / path) for path in paths)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    found = {(Path(path).name, door): figures for path, door, *figures in lines}
    assert found.keys() == {(path, door) for path in paths for door in ("train", "check")}, result.stderr[-2000:]
    assert not list(folder.rglob("*.arrow"))
    return found


@pytest.mark.parametrize("door", ["train", "check"])
@pytest.mark.parametrize("name", [*TEXTS, *(f"{name}.parquet" for name in PARQUET), *PARQUET])
def test_a_bomb_is_one_short_line(costs, name, door):
    message, seconds, megabytes = costs[name, door]
    assert message.startswith("got ") and "expected" in message and len(message) < 1000
    assert (seconds < 2, megabytes < 300) == (True, True), (message, seconds, megabytes)


def test_honest_parquet_is_read(tmp_path):
    """Repeated texts, long ones, and bytes that nothing compresses."""
    rows = [{"id": str(number), "messages": [{"role": "user", "content": "Q" * 999}]} for number in range(20_000)]
    table = pyarrow.Table.from_pylist(rows)
    for settings in ({}, {"compression": "zstd"}, {"compression": "none"}, {"use_dictionary": False}):
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", **settings)
        check_parquet(tmp_path / "rows.parquet")


def test_what_is_too_much_of_a_record():
    assert find_excess({"conversations": TURNS, "images": ["x" * (2 * MOST_TEXT_CHARACTERS)]}) is None
    assert find_excess({"conversations": TURNS, "image": "x" * (2 * MOST_TEXT_CHARACTERS)}) is None
    assert "characters of text" in find_excess({"value": "x" * (MOST_TEXT_CHARACTERS + 1)})
    for levels in (MOST_LEVELS, MOST_LEVELS + 1):
        deep = json.loads("[" * levels + "]" * levels)
        assert (find_excess(deep) is None) == (levels == MOST_LEVELS)


def test_the_other_records_go_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"id": "good", "conversations": TURNS})
    path.write_text("\n".join([good, nest(60, "[", "1", "]"), good]))
    records = list(open_records(DataSource(path=str(path)))[1])
    assert [isinstance(record, RefusedRecord) for record in records] == [False, True, False]
    rows, fates = load_rows([DataSource(path=str(path))], on_bad_row="skip")
    assert len(rows) == 2 and sum(fates.values()) == 1
    with pytest.raises(ValueError, match="got more than 50 lists and objects in each other in record 'record 2'"):
        load_rows([DataSource(path=str(path))])
