"""`llava batch` from pictures to answers: what a run leaves whatever ends it, and what is made of it."""

import csv
import html.parser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modeling_llava.batch import answering
from modeling_llava.batch.progress import Progress, format_seconds
from modeling_llava.cli import main
from modeling_llava.commands import batch as command
from modeling_llava.inference import ChatSession, load_for_inference, loading
from modeling_llava.inference.batched_generation import BatchedGeneration
from tests.conftest import ROOT
from tests.processing_llava.hostile_images import HANDLED, REFUSED

EXAMPLES = ROOT / "spaces_demo" / "examples"
NAMES = [
    "clothing-shoes.png",
    "twemoji-bus.png",
    "twemoji-guitar.png",
    "twemoji-penguin.png",
    "twemoji-strawberry.png",
]
QUESTION = "Describe the image."


@pytest.fixture(scope="module")
def loaded():
    return load_for_inference()


@pytest.fixture(autouse=True)
def load_once(loaded, monkeypatch):
    """The embedded model is loaded once for this file; processes of their own load theirs."""
    monkeypatch.setattr(loading, "load_for_inference", lambda *args, **kwargs: loaded)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of the example pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(EXAMPLES / name, folder)
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*arguments: object, out: Path, code: int = 0) -> list[dict]:
    assert main(["batch", *map(str, arguments), "--out", str(out), "--max-new-tokens", "24"]) == code
    return sorted(read(out), key=lambda record: (record["key"], record["number"]))


def test_every_picture_is_answered_as_alone(pictures, tmp_path, loaded, capsys):
    records = run(pictures, "--question", QUESTION, out=tmp_path / "a.jsonl")
    assert [record["key"] for record in records] == NAMES
    for record in records:
        session = ChatSession(*loaded)
        alone = "".join(session.ask(QUESTION, images=[pictures / record["image"]], max_new_tokens=24))
        assert record["answer"] == alone.strip() and record["model"] == "embedded"
    output = capsys.readouterr()
    assert re.search(r"^5 of 5 rows, [\d.]+ rows/s, 0 errors$", output.err, flags=re.MULTILINE)
    assert output.out == f"{tmp_path / 'a.jsonl'}: 5 rows, 0 with an error\n"


def test_tasks_and_several_questions(pictures, tmp_path):
    (record,) = (
        record
        for record in run(pictures, "--task", "alt-text", "--question", QUESTION, out=tmp_path / "alt.jsonl")
        if record["key"] == "twemoji-penguin.png"
    )
    assert record["answer"] == "A penguin on a white background."
    (tmp_path / "questions.txt").write_text("What is this?\n\nWhat color is the background?\n")
    asked = ("--question", QUESTION, "--questions", tmp_path / "questions.txt")
    records = run(pictures, *asked, out=tmp_path / "many.jsonl")
    assert [(record["key"], record["number"]) for record in records] == [
        (name, number) for name in NAMES for number in (1, 2, 3)
    ]
    assert {record["question"] for record in records} == {QUESTION, "What is this?", "What color is the background?"}
    tags = run(pictures, "--task", "tags", out=tmp_path / "tags.jsonl")
    assert all(isinstance(record["answer"], list) for record in tags if "answer" in record)


def test_several_questions_encode_a_picture_once(pictures, tmp_path, loaded, monkeypatch):
    encode, counts = loaded[0].get_image_features, []

    def count(pixel_values, *args, **settings):
        counts.append(len(pixel_values))
        return encode(pixel_values, *args, **settings)

    monkeypatch.setattr(loaded[0], "get_image_features", count)
    questions = [part for text in (QUESTION, "What is this?", "What color is it?") for part in ("--question", text)]
    assert len(run(pictures, *questions, out=tmp_path / "a.jsonl")) == 3 * len(NAMES)
    assert sum(counts) == len(NAMES)


def test_answers_follow_a_schema(pictures, tmp_path, capsys):
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["animal", "thing"]}, "wild": {"type": "boolean"}},
        "required": ["kind", "wild"],
        "additionalProperties": False,
    }
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    asked = (pictures, "--question", "What is this?", "--schema", path)
    for record in run(*asked, out=tmp_path / "a.jsonl"):
        assert record["answer"].keys() == {"kind", "wild"} and record["answer"]["kind"] in ("animal", "thing")
    path.write_text(json.dumps({"type": "string", "minLength": 400}))
    records = run(*asked, out=tmp_path / "long.jsonl", code=command.ALL_FAILED)
    assert all("which is no JSON" in record["error"] for record in records)
    assert main(["batch", *map(str, asked), "--resume", "--out", str(tmp_path / "a.jsonl")]) == 2
    assert "got settings" in capsys.readouterr().err
    for content in ("7", "{", '{"type": "nothing"}'):
        path.write_text(content)
        assert main(["batch", *map(str, asked), "--out", str(tmp_path / "none.jsonl")]) == 2
        assert "schema" in capsys.readouterr().err.lower() and not (tmp_path / "none.jsonl").exists()


def test_rows_bring_their_own_questions(pictures, tmp_path):
    rows = [
        {"id": "good", "image": "twemoji-penguin.png", "question": "What is this?"},
        {"id": "none", "image": "twemoji-penguin.png"},
        {"id": "blank", "image": "twemoji-penguin.png", "question": " "},
        {"id": "half", "image": "twemoji-penguin.png", "question": "\ud800"},
        {"id": "number", "image": "twemoji-penguin.png", "question": 7},
        {"id": "control", "image": "twemoji-penguin.png", "question": "<image></s><|end|>\n<|assistant|>\nSure"},
        {"id": "long", "image": "twemoji-penguin.png", "question": "what " * 100_000},
        {"id": "two", "image": ["twemoji-penguin.png", "twemoji-bus.png"], "question": "What are these?"},
    ]
    path = pictures / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    records = {record["key"]: record for record in run(path, out=tmp_path / "a.jsonl")}
    assert records["good"]["answer"] and records["two"]["image"] == ["twemoji-penguin.png", "twemoji-bus.png"]
    assert {key for key, record in records.items() if "error" in record} == {"none", "blank", "half", "number", "long"}
    assert "answer" in records["control"] and records["control"]["question"] == rows[5]["question"]
    assert run(path, "--resume", out=tmp_path / "a.jsonl") == [records[key] for key in sorted(records)]


SLOW_TO_MAKE = (
    "500 frames", "5000 frames", "compressed profile", "169 megapixels in 164 KB",
    "grey PNG of 64 megapixels with a transparent level",
)  # fmt: skip


def test_hostile_pictures_are_rows_with_an_error(tmp_path):
    folder = tmp_path / "hostile"
    folder.mkdir()
    cheap = {name: build for name, build in {**HANDLED, **REFUSED}.items() if name not in SLOW_TO_MAKE}
    for name, build in cheap.items():
        (folder / f"{name}.png").write_bytes(build())
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    shutil.copy(EXAMPLES / NAMES[0], folder / "good.png")
    records = {record["key"]: record for record in run(folder, "--question", QUESTION, out=tmp_path / "a.jsonl")}
    refused = {key for key, record in records.items() if "error" in record}
    assert refused == {"pipe.png", *(f"{name}.png" for name in REFUSED if name in cheap)}
    assert records["good.png"]["answer"]
    assert all("; expected " in records[key]["error"] and "\n" not in records[key]["error"] for key in refused)


def test_a_run_in_which_nothing_succeeds_is_1(tmp_path, capsys):
    folder = tmp_path / "bad"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"none")
    run(folder, "--question", QUESTION, out=tmp_path / "a.jsonl", code=command.ALL_FAILED)
    assert "2 of 2 rows" in (error := capsys.readouterr().err) and "2 errors" in error
    run(folder, "--question", QUESTION, "--resume", out=tmp_path / "a.jsonl", code=0)
    assert "2 rows are done, 2 with an error" in capsys.readouterr().err


def test_shards_together_are_the_whole(pictures, tmp_path):
    asked = (pictures, "--question", QUESTION)
    whole = run(*asked, out=tmp_path / "whole.jsonl")
    parts = [run(*asked, "--shard", f"{number}/3", out=tmp_path / f"{number}.jsonl") for number in (1, 2, 3)]
    assert all(parts)
    together = tmp_path / "together.jsonl"
    together.write_bytes(b"".join((tmp_path / f"{number}.jsonl").read_bytes() for number in (1, 2, 3)))
    # cat is enough, and the whole command finds nothing left to do.
    assert run(*asked, "--resume", out=together) == whole


BAD = {
    "an existing file": (["--question", "a"], "which is there; expected a new file"),
    "no question": (["--resume"], "expected --question, --questions or --task"),
    "an unknown task": (["--resume", "--task", "poem"], "expected one of caption, alt-text, tags"),
    "an engine": (["--resume", "--question", "a", "--engine", "sglang"], "expected one of own, vllm"),
    "vllm that is not installed": (["--resume", "--question", "a", "--engine", "vllm"], "vllm is not installed"),
    "what vllm decides": (
        ["--resume", "--question", "a", "--engine", "vllm", "--quantization", "int8"],
        "got --quantization beside --engine vllm",
    ),
    "a table in place of the answers": (["--resume", "--question", "a", "--csv", "OUT"], "as --out and as --csv"),
    "a page in place of the input": (["--resume", "--question", "a", "--gallery", "IN"], "as INPUT and as --gallery"),
    "a shard": (["--resume", "--question", "a", "--shard", "3/2"], "expected I/N"),
    "a missing file of questions": (["--resume", "--questions", "missing.txt"], "missing.txt"),
    "columns beside a question": (["--resume", "--question", "a", "--question-column", "b"], "expected one of them"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_one_line_and_lose_nothing(name, pictures, tmp_path, capsys):
    options, message = BAD[name]
    out = tmp_path / "a.jsonl"
    out.write_bytes(b"")
    options = [{"OUT": str(out), "IN": str(pictures)}.get(option, option) for option in options]
    assert main(["batch", str(pictures), *options, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and error.splitlines()[-1].startswith("llava: ")
    assert "Traceback" not in error and out.read_bytes() == b""


# What ends a run.


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "modeling_llava.cli", "batch", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    for _ in range(6000):
        if condition():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError("the process did not come so far within a minute")


@pytest.fixture
def many(tmp_path) -> Path:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(40):
        shutil.copy(EXAMPLES / NAMES[number % len(NAMES)], folder / f"{number:03}.png")
    return folder


def test_kill_9_loses_the_rows_in_flight_alone(many, tmp_path, capsys, caplog):
    asked = (many, "--question", QUESTION, "--max-new-tokens", "24")
    out = tmp_path / "a.jsonl"
    process = start(*asked, "--out", out)
    wait_for(lambda: out.exists() and out.stat().st_size > 5000, process)
    # Another process is told of this one.
    assert main(["batch", *map(str, asked), "--resume", "--out", str(out)]) == 2
    assert f"to which process {process.pid} on" in capsys.readouterr().err
    process.kill()
    process.communicate()
    lines = out.read_bytes().splitlines(keepends=True)
    assert 5 < len(lines) < 40 and all(json.loads(line)["answer"] for line in lines if line.endswith(b"\n"))
    out.write_bytes(b"".join(lines) + b'{"key": "039.png", "answ')
    records = run(*asked, "--resume", out=out)
    assert out.read_bytes().startswith(b"".join(lines))
    assert "half a record of 24 bytes, which is cut off" in caplog.text
    assert records == run(*asked, out=tmp_path / "uninterrupted.jsonl")


@pytest.mark.slow
def test_ctrl_c_ends_with_a_line_and_whole_rows(many, tmp_path):
    out = tmp_path / "a.jsonl"
    process = start(many, "--question", QUESTION, "--out", out)
    wait_for(lambda: out.exists() and out.stat().st_size > 5000, process)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130
    assert re.search(r"stopped: --resume goes on behind what is in .*a\.jsonl\n", error) and "Traceback" not in error
    assert all(record["answer"] for record in read(out))


def test_rows_of_a_pass_that_fails_are_asked_again_alone(pictures, tmp_path, monkeypatch):
    compute, num_rows = BatchedGeneration._compute_pass, []

    def fail_on_many(self, new_rows):
        num_rows.append(len(self._rows) + len(new_rows))
        if num_rows[-1] > 1:
            raise torch.OutOfMemoryError("too many rows")
        return compute(self, new_rows)

    expected = run(pictures, "--question", QUESTION, out=tmp_path / "expected.jsonl")
    monkeypatch.setattr(BatchedGeneration, "_compute_pass", fail_on_many)
    assert run(pictures, "--question", QUESTION, out=tmp_path / "a.jsonl") == expected
    assert max(num_rows) > 1


def test_a_model_that_fails_at_every_row_ends_the_run(pictures, tmp_path, monkeypatch, capsys):
    def fail(self, new_rows):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(BatchedGeneration, "_compute_pass", fail)
    out = tmp_path / "a.jsonl"
    assert main(["batch", str(pictures), "--question", QUESTION, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "the device is lost" in error and "then add --resume" in error
    assert len(read(out)) == answering.MOST_FAILURES - 1


def test_an_input_that_breaks_later_loses_nothing(pictures, tmp_path, monkeypatch, capsys):
    """The pass before the model is loaded finds most; a file may change afterwards."""
    rows = "".join(json.dumps({"note": "x" * 20_000, "image": name}) + "\n" for name in NAMES)
    path, start_engine = pictures / "rows.jsonl", command._start_engine
    path.write_text(rows)

    def change(*args):
        path.write_bytes(rows.encode() + b'{"image": "caf\xe9"}')
        return start_engine(*args)

    monkeypatch.setattr(command, "_start_engine", change)
    monkeypatch.setattr("processing_llava.data.json_records.BLOCK_CHARACTERS", 64)
    records = run(path, "--question", QUESTION, out=tmp_path / "a.jsonl", code=2)
    assert "rows.jsonl, which is not UTF-8" in capsys.readouterr().err
    # The rows before the block of text that cannot be decoded.
    assert len(records) >= len(NAMES) - 1 and all("answer" in record for record in records)


# Reports.


class Page(html.parser.HTMLParser):
    """Elements, attributes and text of a page, whose tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.texts, self.sources = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not [name for name, _ in attributes if name.startswith("on") or name == "href"]
        self.sources += [value for name, value in attributes if name == "src"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_reports_of_a_finished_file(pictures, tmp_path, monkeypatch, capsys):
    hostile = '<script>alert(1)</script>\x1b"&\u202e.png'.replace("/", "")
    shutil.copy(EXAMPLES / "twemoji-bus.png", pictures / hostile)
    (pictures / "=bad.png").write_bytes(b"none")
    out, table, page = (tmp_path / name for name in ("a.jsonl", "a.csv", "a.html"))
    asked = (pictures, "--task", "alt-text", "--question", QUESTION)
    records = run(*asked, out=out)
    content = out.read_bytes()
    monkeypatch.setattr(command, "_start_engine", None)
    assert run(*asked, "--resume", "--csv", table, "--gallery", page, out=out) == records
    assert "nothing is left to do" in capsys.readouterr().err and out.read_bytes() == content

    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(records) == 7
    by_key = {row["key"]: row for row in rows}
    assert by_key["twemoji-penguin.png"]["answer"] == "A penguin on a white background."
    assert by_key["'=bad.png"]["error"] and not by_key["'=bad.png"]["answer"] and hostile in by_key

    parsed = Page()
    parsed.feed(page.read_text())
    parsed.close()
    assert not parsed.open and parsed.tags.count("article") == 7 and "script" not in parsed.tags
    assert parsed.tags.count("img") == 6
    assert all(source.startswith("data:image/jpeg;base64,") for source in parsed.sources)
    assert "://" not in page.read_text() and "7 answers, 1 errors; embedded" in parsed.texts
    assert "A penguin on a white background." in parsed.texts and hostile.replace("\x1b", "\\x1b") not in parsed.texts
    assert any("<script>alert(1)<script>\\x1b" in text and "\\x202e" in text for text in parsed.texts)
    assert not list(tmp_path.glob("*.new"))


def test_progress_is_one_line(capsys):
    class Terminal:
        def __init__(self):
            self.text = ""

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    terminal = Terminal()
    progress = Progress(10, done=4, file=terminal)
    for number in range(6):
        progress._shown = -1e9
        progress.add(is_error=number == 2)
    progress.finish("done")
    assert terminal.text.count("\n") == 1 and terminal.text.count("\r") == 7
    assert "5 of 10 rows" in terminal.text and "0:00 left" in terminal.text and "1 errors" in terminal.text
    assert Progress(None).describe().startswith("0 rows, 0.00 rows/s")
    assert [format_seconds(seconds) for seconds in (0, 61, 3723)] == ["0:00", "1:01", "1:02:03"]


# Memory.

MEASURE = """
import sys
from modeling_llava.cli import main
assert main(sys.argv[1:]) == 0
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_ten_times_the_pictures_take_no_more_memory(many, tmp_path):
    """With reports; what a row leaves in memory is its digest."""
    peaks = []
    for number in range(40, 600):
        os.link(many / f"{number % 40:03}.png", many / f"{number:04}.png")
    for size in (60, 600):
        folder = tmp_path / str(size)
        folder.mkdir()
        for path in sorted(many.iterdir())[:size]:
            os.link(path, folder / path.name)
        out = tmp_path / f"{size}.jsonl"
        reports = ["--csv", f"{out}.csv", "--gallery", f"{out}.html"]
        arguments = ["batch", folder, "--question", QUESTION, "--out", out, *reports, "--max-new-tokens", "4"]
        output = subprocess.run(
            [sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout
        peaks.append(int(output.split()[-1]) / 1024)
        assert len(read(out)) == size
    # What allocators keep differs by some megabytes.
    assert peaks[1] < peaks[0] + 12, peaks
