"""Folders of strangers cost what they hold, lead nowhere, run nothing, and are refused in one line."""

import json
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modeling_llava.cli import main
from processing_llava.messages import MAX_LINE
from tests.modeling_llava.checkpoints import odd_values
from tests.modeling_llava.checkpoints.folder_changes import LAYOUTS, MIB, write_code
from tests.modeling_llava.checkpoints.hostile_folders import CHANGES, HARMLESS

MAX_SECONDS, MAX_BYTES = 2.0, 300 * MIB
NUM_QUICK, SLOW_STEP = 60, 40
"""Of the odd values: how many are tried always, and of how many one in the slow suite, where all take 20 minutes."""
WORKER = "tests.modeling_llava.checkpoints.hostile_folders"
ALL = [(layout, name) for table in (HARMLESS, CHANGES) for name, (_, layouts) in table.items() for layout in layouts]


def choose_quick() -> list[tuple[str, str]]:
    """Every change in one layout, another one each time."""
    chosen = []
    for number, (name, (_, layouts)) in enumerate((HARMLESS | CHANGES).items()):
        chosen.append((layouts[number % len(layouts)], name))
    return chosen


def prepare(layouts: Iterable[str], folder: Path) -> None:
    for layout in layouts:
        if not (folder / layout).exists():
            (folder / layout).mkdir()
            LAYOUTS[layout](folder / layout)


def run_worker(cases: list[tuple[str, str]], prepared: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What became of each folder, in one process that is asked for "y" wherever it asks."""
    prepare({layout for layout, _ in cases}, prepared)
    lines = "\n".join(json.dumps([layout, name, str(prepared)]) for layout, name in cases)
    result = subprocess.run([sys.executable, "-m", WORKER], input=lines, capture_output=True, text=True, check=True)
    for line in result.stdout.splitlines():
        yield json.loads(line)


def find_faults(layout: str, name: str, found: dict[str, Any]) -> list[str]:
    result, faults = found["result"], []
    if (result == "loaded") != (name in HARMLESS) and name in CHANGES | HARMLESS:
        faults.append(result)
    if "\n" in result or len(result) > MAX_LINE:
        faults.append(f"several lines, or {len(result)} characters: {result[:2000]}")
    if found["seconds"] > MAX_SECONDS:
        faults.append(f"{found['seconds']:.1f} seconds")
    if found["bytes"] > MAX_BYTES:
        faults.append(f"{found['bytes'] // MIB} MB")
    if found["ran"] or found["asked"]:
        faults.append("code was run or asked for")
    return [f"{layout}, {name}: {fault}" for fault in faults]


@pytest.mark.parametrize(
    "cases", [pytest.param(choose_quick(), id="quick"), pytest.param(ALL, id="all", marks=pytest.mark.slow)]
)
def test_folders_of_strangers(cases, tmp_path):
    assert len(cases) >= 150
    found = list(run_worker(cases, tmp_path))
    assert [(layout, name) for layout, name, _ in found] == cases
    assert [fault for entry in found for fault in find_faults(*entry)] == []


@pytest.mark.parametrize(
    "step", [pytest.param(None, id="quick"), pytest.param(SLOW_STEP, id="many", marks=pytest.mark.slow)]
)
def test_odd_values_in_every_field(step, tmp_path):
    """They are answered with, or one line says what is wrong, at the cost of loading."""
    prepare(odd_values.FILES, tmp_path)
    cases = list(odd_values.list_changes(tmp_path))
    assert len(cases) > 15_000
    chosen = cases[::step] if step else random.Random(0).sample(cases, NUM_QUICK)
    found = list(run_worker(chosen, tmp_path))
    assert [(layout, name) for layout, name, _ in found] == chosen
    assert [fault for entry in found for fault in find_faults(*entry)] == []


@pytest.mark.parametrize(
    ("layout", "filename", "auto"),
    [
        ("any_llava", "config.json", "AutoConfig"),
        ("original", "tokenizer_config.json", "AutoTokenizer"),
    ],
)
def test_a_command_asks_nothing(layout, filename, auto, tmp_path, monkeypatch, capsys, caplog):
    LAYOUTS[layout](tmp_path)
    write_code(tmp_path / "model", filename, auto)

    def answer(*arguments) -> str:
        raise AssertionError("it asked")

    monkeypatch.setattr("builtins.input", answer)
    command = ["ask", "spaces_demo/examples/twemoji-bus.png", "What?", "--model", str(tmp_path / "model")]
    assert main([*command, "--max-new-tokens", "1"]) == 0
    assert not (tmp_path / "model" / "ran").exists()
    assert f"{filename} names code of its own (auto_map); it is not run" in caplog.text


@pytest.mark.parametrize("name", ["hidden_size 1e9", "config.json a pipe", "layers 1e30", "weights cut"])
def test_a_command_ends_in_one_line(name, tmp_path, capsys):
    LAYOUTS["any_llava"](tmp_path)
    CHANGES[name][0](tmp_path / "model")
    command = ["ask", "spaces_demo/examples/twemoji-bus.png", "What?", "--model", str(tmp_path / "model")]
    assert main(command) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("llava: got ")
