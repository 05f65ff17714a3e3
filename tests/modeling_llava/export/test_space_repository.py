"""A Space that names this package carries it, and starts from what it carries."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_llava.cli import main
from tests.conftest import ROOT

BASE = ["--license", "apache-2.0", "--base-model", "someone/vicuna"]
START_SPACE = """
import app, hub_cards, modeling_llava, processing_llava, spaces_demo
from modeling_llava.inference.loading import EMBEDDED_MODEL
from spaces_demo.models import ModelMenu

for package in (hub_cards, modeling_llava, processing_llava, spaces_demo):
    print(package.__file__)
print(EMBEDDED_MODEL)
app.build_page(ModelMenu([]))
"""


def write_space(folder: Path, requirements: str) -> str:
    space = folder / "space"
    space.mkdir()
    (space / "app.py").write_text("import gradio\n")
    (space / "requirements.txt").write_text(requirements)
    return str(space)


def test_a_space_carries_the_package_that_is_on_no_index(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(ROOT / "spaces_demo"), "--out", str(out)]) == 0
    assert "note: the Space carries anyllava" in capsys.readouterr().out
    assert not list(out.rglob("*.pyc")) and not list((out / "modeling_llava" / "tiny_llava").glob("*.py"))
    lines = (out / "requirements.txt").read_text().splitlines()
    assert not any(line.startswith("anyllava") for line in lines)
    assert {"gradio==6.31.0", "safetensors", "jinja2"} <= set(lines)
    assert len({re.match(r"[\w-]*", line)[0] for line in lines}) == len(lines)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", START_SPACE]
    result = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(line.startswith(str(out)) for line in result.stdout.splitlines())


@pytest.mark.parametrize("line", ["anyllava==0.0.1", "AnyLLaVA[demo]==9"])
def test_a_space_that_names_another_version_is_refused(line, tmp_path, capsys):
    space = write_space(tmp_path, f"gradio==6.31.0\n{line}\n")
    assert main(["export", space, "--out", str(tmp_path / "out"), *BASE]) == 2
    assert f"got anyllava=={line.partition('==')[2]} in requirements.txt" in capsys.readouterr().err


def test_extras_of_the_package_become_requirements_of_a_space(tmp_path):
    space = write_space(tmp_path, "gradio==6.31.0\nAnyLLaVA[train, demo]  # ours\ntrl==1.16.0\n")
    assert main(["export", space, "--out", str(tmp_path / "out"), *BASE]) == 0
    lines = (tmp_path / "out" / "requirements.txt").read_text().splitlines()
    assert {"gradio==6.31.0", "trl==1.16.0"} <= set(lines)
    assert {"peft", "datasets"} <= {line.partition(">=")[0] for line in lines}
    assert "trl" not in lines and "onnx" not in lines
