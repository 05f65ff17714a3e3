"""The README's code runs: its Python blocks in one process, its llava commands in a shell."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(command: list[str]) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def python_output() -> str:
    """What the Python blocks print; they also write the files that commands read."""
    # A model that an earlier test trained is not written over.
    shutil.rmtree(ROOT / "runs" / "own_pictures", ignore_errors=True)
    return run([sys.executable, "-W", "error::DeprecationWarning", "-c", "\n".join(blocks("python"))])


def test_python_blocks_run(python_output):
    assert python_output.startswith("a penguin\na guitara musical instrument")
    for answer in ("0 a guitar\n", "1 a penguin\n", "2 a strawberry\n"):
        assert answer in python_output


def llava_commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.startswith("llava ")]


def test_the_first_commands_are_answered_right():
    first, second = llava_commands()[:2]
    assert run(["sh", "-c", first]).strip() == "The picture shows a penguin on a white background."
    assert json.loads(run(["sh", "-c", second]))["answer"] == "shoes"


@pytest.mark.parametrize("command", llava_commands()[2:])
def test_llava_commands_run(command, python_output):
    assert run(["sh", "-c", command]).strip()


def test_the_shown_rows_are_learned(python_output):
    """Once the commands above were run: each row is asked for, and answered as it says."""
    asked = {tuple(shlex.split(command)[2:4]): command for command in llava_commands() if "own_pictures" in command}
    rows = json.loads((ROOT / "runs" / "own_pictures" / "rows.json").read_text())
    for row in rows:
        question, answer = (turn["value"] for turn in row["conversations"])
        command = asked[f"spaces_demo/examples/{row['image']}", question.removeprefix("<image>\n")]
        assert run(["sh", "-c", command]).strip() == answer


def test_make_targets_exist():
    targets = re.findall(r"make ([a-z-]+)", README)
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_tree_names_what_there_is():
    tree = blocks("")[-1]
    for folder, name in re.findall(r"^(\S*)?\s*([\w/]+\.py)\b", tree, flags=re.MULTILINE):
        assert list(ROOT.glob(f"*/{name}")), f"{folder}{name}"
