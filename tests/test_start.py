"""The command starts at once: help, the version and mistakes import nothing, and a command only what it runs."""

import configparser
import json
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.tiny import save_tiny_checkpoint

COMMANDS = (
    "ask",
    "chat",
    "batch",
    "demo",
    "serve",
    "assemble",
    "merge",
    "doctor",
    "check-data",
    "train",
    "export",
    "push",
)
RUN = """
import json, sys
try:
    code = main(sys.argv[1:])
except SystemExit as exit:
    code = exit.code
print(json.dumps([code, sorted(sys.modules)]))
"""
TYPOS = (
    [],
    ["aks", "cat.png", "What?"],
    ["--modle", "x"],
    ["ask", "cat.png", "What?", "--modle", "x"],
    ["chat", "--temperature", "hot"],
    ["demo", "--port", "first"],
    ["assemble", "--out", "x"],
    ["merge", "adapter"],
    ["doctor", "--parameters", "many"],
    ["check-data"],
    ["train"],
    ["train", "recipe.yaml", "--previw"],
    ["export", "model"],
    ["push", "model", "--repo", "--dry-run"],
)


def run_command(*arguments: str, cwd=None) -> tuple[int, str, set[str]]:
    """Exit code and output of the command that pip installs, and what it imported."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    module, function = re.search(
        r"llava = ([\w.]+):(\w+)", settings["options.entry_points"]["console_scripts"]
    ).groups()
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {module} import {function} as main{RUN}"
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    *printed, last = result.stdout.splitlines()
    exit_code, modules = json.loads(last)
    return exit_code, "\n".join(printed) + result.stderr, set(modules)


def find_imported(modules: set[str]) -> set[str]:
    """What is neither the standard library nor the command's own; an editable install adds a finder."""
    tops = {name.split(".")[0] for name in modules}
    return {
        name
        for name in tops - sys.stdlib_module_names - {"__main__", "spaces_demo"}
        if not name.startswith(("__editable__", "_distutils_hack", "sitecustomize"))
    }


def test_help_names_every_command():
    code, printed, modules = run_command("--help")
    assert code == 0 and not find_imported(modules)
    assert tuple(re.findall(r"^    ([a-z-]+)(?:  |$)", printed, flags=re.MULTILINE)) == COMMANDS


def test_the_version_imports_nothing():
    code, printed, modules = run_command("--version")
    assert code == 0 and not find_imported(modules)
    assert re.fullmatch(r"anyllava \d+\.\d+\.\d+", printed)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_imports_nothing(command):
    code, printed, modules = run_command(command, "--help")
    assert code == 0 and not find_imported(modules)
    assert printed.startswith(f"usage: llava {command} ")


@pytest.mark.parametrize("arguments", TYPOS, ids=" ".join)
def test_a_typo_imports_nothing(arguments):
    code, printed, modules = run_command(*arguments)
    assert code == 2 and not find_imported(modules)
    assert re.search(r"^llava[a-z -]*: error: ", printed, flags=re.MULTILINE)


PARTS = {
    *(
        "modeling_llava.inference.chat_session",
        "modeling_llava.commands.doctor",
        "modeling_llava.export",
        "modeling_llava.training",
    ),
    *("processing_llava.data.data_check", "spaces_demo.app", "datasets", "gradio", "matplotlib", "peft", "trl"),
}
RUN_BY = {
    "ask": {"modeling_llava.inference.chat_session"},
    "doctor": {"modeling_llava.commands.doctor"},
    "check-data": {"processing_llava.data.data_check"},
    "push": {"modeling_llava.export"},
}
"""Which of the parts each command runs."""


@pytest.mark.parametrize("command", RUN_BY)
def test_a_command_imports_only_what_it_runs(command, tmp_path):
    model = str(save_tiny_checkpoint(tmp_path / "model"))
    examples = ROOT / "spaces_demo" / "examples"
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bus."}]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "a", "image": "twemoji-bus.png", "conversations": turns}]))
    arguments = {
        "ask": [str(examples / "twemoji-bus.png"), "What?", "--model", model, "--max-new-tokens", "2"],
        "doctor": ["--model", model],
        "check-data": ["rows.json", "--image-folder", str(examples), "--model", model],
        "push": [model, "--repo-id", "me/x", "--license", "mit", "--base-model", "a/b", "--dry-run"],
    }[command]
    code, printed, modules = run_command(command, *arguments, cwd=tmp_path)
    assert code == 0, printed
    assert modules & PARTS == RUN_BY[command]


def test_importing_the_package_registers_everything():
    code = "import modeling_llava, transformers; transformers.AutoModelForVision2Seq; transformers.AnyLlavaProcessor"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("module", ["modeling_llava.cli", "spaces_demo"])
def test_modules_run_the_same_command(module):
    arguments = [sys.executable, "-m", module, *(["demo"] if module == "modeling_llava.cli" else []), "--help"]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith("usage: llava demo "), result.stderr
