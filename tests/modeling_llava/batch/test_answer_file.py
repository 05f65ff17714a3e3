"""A file of answers is whole after whatever ends a run, has one writer, and takes answers of one order alone."""

import json
import resource
from pathlib import Path

import pytest

from modeling_llava.batch.answer_file import AnswerFile, cut_broken_end, read_records
from modeling_llava.batch.answering import Question, Result, build_record, list_questions
from modeling_llava.batch.inputs import InputRow
from modeling_llava.batch.tasks import Order

ORDER = Order(model="m", questions=("What?", "Why?"), settings={"max_new_tokens": 8})
ROWS = [InputRow(f"{number}.png", f"{number}.png", None, None) for number in range(20)]


def record(row: InputRow, number: int = 1, order: Order = ORDER, text: str = "A dog.") -> dict:
    return build_record(Result(Question(row, number, order.asked[number - 1] or row.question), text), order)


def fill(path: Path, rows=ROWS, order: Order = ORDER) -> list[bytes]:
    with AnswerFile(path, order, resume=True) as file:
        for row in rows:
            file.write(record(row, order=order))
    return path.read_bytes().splitlines(keepends=True)


def test_a_record_is_a_line_that_says_all_of_its_answer(tmp_path):
    path = tmp_path / "a.jsonl"
    (line,) = fill(path, [InputRow("caf\u00e9\u2028.png", "caf\u00e9.png", None, None)])
    assert json.loads(line) == {
        "key": "caf\u00e9\u2028.png",
        "number": 1,
        "image": "caf\u00e9.png",
        "question": "What?",
        "answer": "A dog.",
        "finish_reason": "stop",
        "task": None,
        "model": "m",
        "settings": {"max_new_tokens": 8},
    }


@pytest.mark.parametrize("size", range(0, 400, 23))
def test_a_file_that_ends_anywhere_is_gone_on_with(size, tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    content = b"".join(fill(path, ROWS[:3]))
    size = min(size, len(content))
    path.write_bytes(content[:size])
    whole = content[:size].rfind(b"\n") + 1
    with AnswerFile(path, ORDER, resume=True) as file:
        assert path.read_bytes() == content[:whole]
        assert len(file.done) == content[:whole].count(b"\n")
        assert ("which is cut off" in caplog.text) == (whole < size)
        left = [(question.row.key, question.number) for question in list_questions(ROWS[:3], ORDER, file.done)]
    known = {(row.key, 1) for row in ROWS[: len(file.done)]}
    assert left == [pair for row in ROWS[:3] for pair in ((row.key, 1), (row.key, 2)) if pair not in known]


def test_a_long_half_line_is_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    for beginning in (b"", b"whole\n"):
        path.write_bytes(beginning + b"x" * 200_000)
        assert cut_broken_end(path) == 200_000 and path.read_bytes() == beginning
    assert cut_broken_end(path) == 0


def test_a_disk_that_is_full_keeps_whole_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AnswerFile(path, ORDER, resume=False) as file:
        file.write(record(ROWS[0]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(ValueError, match="make room, then add --resume") as error:
                for row in ROWS[1:]:
                    file.write(record(row))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in str(error.value)
    lines = path.read_bytes().splitlines(keepends=True)
    assert 1 < len(lines) < len(ROWS) and all(line.endswith(b"\n") for line in lines)
    assert len(list(read_records(path))) == len(lines)


def test_an_existing_file_is_left_alone_without_resume(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("mine")
    with pytest.raises(ValueError, match="which is there; expected a new file: add --resume"):
        AnswerFile(path, ORDER, resume=False)
    assert path.read_text() == "mine"
    with pytest.raises(ValueError, match="is no file"):
        AnswerFile(tmp_path, ORDER, resume=False)
    fill(tmp_path / "missing" / "below" / "a.jsonl")


@pytest.mark.parametrize("line", [b"{}", b"7", b"{broken", b"[]", b"", b"\xff", b'{"key": 1}', b"[" * 10_000])
def test_a_line_that_is_no_record_is_named(line, tmp_path):
    path = tmp_path / "a.jsonl"
    content = b"".join(fill(path, ROWS[:2])) + line + b"\n"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="whose line 3 is no record of llava batch"):
        AnswerFile(path, ORDER, resume=True)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b'{"id": 1, "image": "a.png"}', b"notes", b'{"id": 1}\n{"id": 2}', b"\xff"])
def test_a_file_of_somebody_else_stays_as_it_is(content, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="whose line 1 is no record of llava batch"):
        AnswerFile(path, ORDER, resume=True)
    assert path.read_bytes() == content


CHANGES = {
    "model": Order(model="other", questions=ORDER.questions, settings=ORDER.settings),
    "task": Order(model="m", questions=ORDER.questions, settings=ORDER.settings, task="tags"),
    "question": Order(model="m", questions=("Why?", "What?"), settings=ORDER.settings),
    "settings": Order(model="m", questions=ORDER.questions, settings={"max_new_tokens": 9}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_of_another_order_is_refused(name, tmp_path):
    path = tmp_path / "a.jsonl"
    fill(path)
    with pytest.raises(ValueError, match=f"got {name} .*, and .* in line 1 of .*a.jsonl; expected the same"):
        AnswerFile(path, CHANGES[name], resume=True)


def test_questions_of_rows_may_not_change(tmp_path):
    path, order = tmp_path / "a.jsonl", Order(model="m")
    rows = [InputRow("a", "a.png", "What?", None), InputRow("b", "b.png", None, None)]
    fill(path, rows, order)
    with AnswerFile(path, order, resume=True) as file:
        assert not list(list_questions(rows, order, file.done))
        with pytest.raises(ValueError, match="got the question 'Why\\?' of 'a', which has an answer to another one"):
            list(list_questions([InputRow("a", "a.png", "Why?", None)], order, file.done))


def test_a_row_that_is_there_twice_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = fill(path, ROWS[:2])
    path.write_bytes(b"".join([*lines, lines[0]]))
    with pytest.raises(ValueError, match="whose line 3 has the key '0.png' again"):
        AnswerFile(path, ORDER, resume=True)


def test_halves_of_surrogate_pairs_are_escapes_in_json(tmp_path):
    path, order = tmp_path / "a.jsonl", Order(model="m", questions=("What?",), schema={})
    with AnswerFile(path, order, resume=False) as file:
        file.write(record(ROWS[0], order=order, text='{"a": "\\ud800"}'))
    path.read_bytes().decode()
    ((_, found),) = read_records(path)
    assert found["answer"] == {"a": "\ud800"}
