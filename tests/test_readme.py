"""READMEs are true: their code runs, and what they name is there.

Python blocks of a README run in one process, llava commands in a shell; figures stand in BENCHMARKS.md, paths and
links lead somewhere, and tables of fields are those of the dataclasses. `python -m tests.test_readme` writes these
tables anew.

What is surprising: a name is looked for as a file of this repository, since an import may find another installation.
"""

import ast
import dataclasses
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.report import RESULTS, read_results, render, render_headlines
from modeling_llava.training.recipe import Recipe
from processing_llava.data.data_sources import DataSource
from processing_llava.image_limits import ImageLimits
from tests.conftest import ROOT

PACKAGES = ("modeling_llava", "processing_llava", "spaces_demo", "hub_cards", "benchmarks", "tests")
READMES = (
    "README.md",
    "modeling_llava/README.md",
    "modeling_llava/training/README.md",
    "processing_llava/README.md",
    "tests/README.md",
)
"""Those whose code runs, in this order: later ones use what earlier ones wrote."""
CHECKED = sorted(
    {
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(path for name in PACKAGES for path in (ROOT / name).rglob("README.md")),
    }
)
"""Those whose paths are looked for."""
DOORS = ("modeling_llava", "modeling_llava.inference", "processing_llava")
FIELDS = {"Recipe": Recipe, "DataSource": DataSource, "ImageLimits": ImageLimits}
"""Dataclasses that a README shows, between `<!-- fields: NAME -->` and `<!-- end -->`."""


def blocks(readme: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / readme).read_text(), flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def run(command: list[str]) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def server():
    """The server that README starts, which its Python blocks ask."""
    (command,) = (line for line in all_commands() if line.startswith("llava serve"))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(shlex.split(command), stdout=subprocess.PIPE, cwd=ROOT, env=environment)
    with process:
        assert process.stdout.readline().startswith(b"embedded at http://127.0.0.1:8000/v1")
        yield
        process.terminate()


@pytest.fixture(scope="module")
def python_output(server) -> dict[str, str]:
    """What the Python blocks of each README print; they also write the files that commands read."""
    # A model that an earlier test trained is not written over.
    shutil.rmtree(ROOT / "runs" / "own_pictures", ignore_errors=True)
    return {
        name: run([sys.executable, "-W", "error::DeprecationWarning", "-c", "\n".join(blocks(name, "python"))])
        for name in READMES
    }


def test_python_blocks_run(python_output):
    assert python_output["README.md"].startswith("a guitara musical instrument")
    assert python_output["README.md"].endswith("a strawberry\n")
    answers = python_output["modeling_llava/README.md"]
    assert answers.startswith("a penguin\n")
    for answer in ("0 a guitar\n", "1 a penguin\n", "2 a strawberry\n", "\nyes\n"):
        assert answer in answers
    assert python_output["processing_llava/README.md"].startswith("RGB ")
    assert python_output["tests/README.md"].startswith("torch.Size(")


def all_commands() -> list[str]:
    return [
        line
        for name in READMES
        for block in blocks(name, "bash")
        for line in block.splitlines()
        if line.startswith("llava ")
    ]


def llava_commands() -> list[str]:
    """Those that end."""
    return [line for line in all_commands() if not line.startswith("llava serve")]


def test_the_first_commands_are_answered_right():
    first, second = llava_commands()[:2]
    assert run(["sh", "-c", first]).strip() == "The picture shows a penguin on a white background."
    assert json.loads(run(["sh", "-c", second]))["answer"] == "shoes"


@pytest.mark.parametrize("command", llava_commands()[2:])
def test_llava_commands_run(command, python_output):
    assert run(["sh", "-c", command]).strip()


def test_the_shown_rows_are_learned(python_output):
    """Once the commands above were run: each row is asked for, and answered as it says."""
    asked = {tuple(shlex.split(command)[2:4]): command for command in llava_commands() if "llava ask" in command}
    rows = json.loads((ROOT / "runs" / "own_pictures" / "rows.json").read_text())
    for row in rows:
        question, answer = (turn["value"] for turn in row["conversations"])
        command = asked[f"spaces_demo/examples/{row['image']}", question.removeprefix("<image>\n")]
        assert run(["sh", "-c", command]).strip() == answer


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {target for path in CHECKED for target in re.findall(r"(?:`|^)make ([a-z-]+)", path.read_text(), re.M)}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def find_anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a file."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def list_links(path: Path) -> list[str]:
    """Targets of links and pictures that are no addresses."""
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    return [link for link in links if not link.startswith(("http://", "https://"))]


@pytest.mark.parametrize("path", CHECKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in list_links(path):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert ROOT in target.resolve().parents, f"{link} leads out of the repository"
        assert not anchor or anchor in find_anchors(target), link


def list_paths(text: str) -> set[str]:
    """What a text names as a file: in back quotes with the ending of a source file, or anywhere below a package."""
    names = re.findall(r"`([\w./-]+\.(?:py|jinja|md))`", text)
    names += re.findall(rf"(?<![\w./-])((?:{'|'.join(PACKAGES)}|\.ci)/[\w./*-]*[\w*])(?![\w*]|-?\{{)", text)
    return set(names)


@pytest.mark.parametrize("path", CHECKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_are_there(path):
    """From the README's folder, or one above it up to the top of the repository."""
    made_by_runs = {"benchmarks/results/7b-cuda.json"}
    folders = [folder for folder in path.parents if folder == ROOT or ROOT in folder.parents]
    for name in list_paths(path.read_text()) - made_by_runs:
        assert any(list(folder.glob(name)) for folder in folders), f"{path.relative_to(ROOT)} names {name}"


@pytest.mark.parametrize("path", CHECKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_to_run_are_there(path):
    for name in re.findall(rf"-m\s+((?:{'|'.join(PACKAGES)})[\w.]*)", path.read_text()):
        module = ROOT / name.rstrip(".").replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), name


@pytest.mark.parametrize("name", [name for name in READMES if blocks(name, "")])
def test_trees_name_what_there_is(name):
    """Every line of a tree begins with a file or folder beside the README, and every one is named."""
    folder = (ROOT / name).parent
    named = {line.split()[0] for block in blocks(name, "") for line in block.splitlines()}
    for item in named:
        assert (folder / item).exists(), item
    files = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    folders = {f"{path.parent.name}/" for path in folder.glob("*/*.*") if path.suffix in (".py", ".jinja")}
    assert files | folders == {item for item in named if item.endswith((".py", "/"))}


def test_the_doors_hold_what_readme_names():
    """Readers of READMEs import from three places, and `__all__` there is what README's last table says."""
    readme = (ROOT / "README.md").read_text()
    for door in DOORS:
        (row,) = re.findall(rf"^\| \[`{re.escape(door)}`\]\S+ \|(.*)\|$", readme, flags=re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", row)) == set(import_module(door).__all__), door
    for name in READMES[:-1]:
        for node in ast.walk(ast.parse("\n".join(blocks(name, "python")))):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in PACKAGES:
                assert node.module in DOORS, node.module
                assert {alias.name for alias in node.names} <= set(import_module(node.module).__all__)


def test_figures_are_rows_of_benchmarks():
    """README's tables repeat the beginning of BENCHMARKS.md, and its sentences the figures in them."""
    readme = (ROOT / "README.md").read_text()
    headlines = render_headlines([read_results(path) for path in sorted(RESULTS.glob("*.json"))])
    rows = re.findall(r"^\|.* \d[\d.,]* \S+ \| \d[\d.,]* \S+ \|.*\|$", readme, flags=re.MULTILINE)
    assert len(rows) == 3
    for row in rows:
        assert row in headlines, row
    for figure in re.findall(r"\d[\d.,]* (?:rows|tokens|images)/s", readme):
        assert f" {figure} " in headlines, figure


def test_benchmarks_is_what_report_writes():
    tables = sorted(RESULTS.glob("*.md"))
    assert (ROOT / "BENCHMARKS.md").read_text() == render(sorted(RESULTS.glob("*.json")), tables=tables)


def render_fields(kind: type) -> str:
    """The fields of a dataclass as a Markdown table: name, default, and the text below it."""
    (body,) = (node.body for node in ast.parse(textwrap.dedent(inspect.getsource(kind))).body)
    texts = {}
    for node, following in zip(body, body[1:]):
        is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if isinstance(node, ast.AnnAssign) and is_text:
            texts[node.target.id] = " ".join(following.value.value.split()).replace("|", "\\|")
    lines = ["| field | default | what it is |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        lines.append(f"| `{field.name}` | {_format_default(field)} | {texts.get(field.name, '')} |")
    return "\n".join(lines)


def _format_default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is None:
        return ""
    if dataclasses.is_dataclass(value):
        return f"`{type(value).__name__}()`"
    if isinstance(value, str):
        return f"`{value}`"
    return f"`{json.dumps(value)}`"


def with_fields(text: str) -> str:
    """A README with its tables of fields written anew."""
    return re.sub(
        r"(<!-- fields: (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{render_fields(FIELDS[found[2]])}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


def test_tables_of_fields_are_those_of_the_code():
    shown = []
    for name in READMES:
        text = (ROOT / name).read_text()
        shown += re.findall(r"<!-- fields: (\w+) -->", text)
        assert text == with_fields(text), f"{name}: run python -m tests.test_readme"
    assert sorted(shown) == sorted(FIELDS)


if __name__ == "__main__":
    for readme in READMES:
        (ROOT / readme).write_text(with_fields((ROOT / readme).read_text()))
