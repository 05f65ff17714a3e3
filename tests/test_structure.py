"""Rules of the layout that a reader relies on: what is bundled, who may import whom, and the doors."""

import ast
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

from modeling_llava.export.model_repository import collect_modules
from tests.conftest import ROOT

PACKAGES = ("modeling_llava", "processing_llava", "hub_cards", "spaces_demo")
SEAMS = {"checkpoint_mixin", "original_processor"}
"""Mixins that read the layouts of other code, which a Hub repository does not need: export leaves them empty."""
NAMES = {"__init__", "registration", "auto", "assemble", "cli"}
"""At the top of modeling_llava beside the bundle: the door, what registers, a new LLaVA, and the command."""
HUB_PACKAGES = {"torch", "transformers", "huggingface_hub", "PIL", "numpy", "tokenizers", "jinja2"}

_PROCESSING = {"processing_llava", "processing_llava/original", "processing_llava/templates"}
_MODEL = _PROCESSING | {"modeling_llava", "modeling_llava/checkpoints", "modeling_llava/acceleration"}
_RECORDS = {"modeling_llava/records"}
_ANSWERS = _MODEL | {"modeling_llava/inference"}
_DATA = {"processing_llava/data"}
IMPORTS = {
    "processing_llava": _PROCESSING,
    "processing_llava/original": _PROCESSING,
    "processing_llava/templates": set(),
    "processing_llava/data": _PROCESSING,
    "modeling_llava": _PROCESSING | {"modeling_llava/checkpoints"},
    "modeling_llava/checkpoints": _PROCESSING | {"modeling_llava/acceleration", "modeling_llava/configuration_llava"},
    "modeling_llava/acceleration": {"processing_llava"},
    "modeling_llava/inference": _MODEL,
    "modeling_llava/records": {"hub_cards", "processing_llava", "processing_llava/data"},
    "modeling_llava/training": _MODEL | _RECORDS | _DATA,
    "modeling_llava/export": _MODEL | _RECORDS | _DATA | {"hub_cards"},
    "modeling_llava/batch": _ANSWERS | _RECORDS | _DATA,
    "modeling_llava/serving": _ANSWERS | _DATA | {"modeling_llava/commands/errors"},
    "modeling_llava/tiny_llava": _ANSWERS | _RECORDS | _DATA | {"modeling_llava/training"},
    "modeling_llava/commands": _ANSWERS
    | _RECORDS
    | _DATA
    | {"modeling_llava/batch", "modeling_llava/training", "modeling_llava/export", "modeling_llava/serving"},
    "hub_cards": set(),
    "spaces_demo": _ANSWERS | {"modeling_llava/commands", "modeling_llava/serving"},
}
"""Which rooms the files of a room import beside their own; a file stands for itself alone."""
EXCEPTIONS = {
    ("modeling_llava/cli.py", "spaces_demo"): "the command as a module; it starts where torch is not imported",
    ("processing_llava/__init__.py", "processing_llava/data"): "the door",
}
DOORS = ("modeling_llava", "modeling_llava.inference", "processing_llava")


def list_files() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py"))


def room_of(module: str) -> str:
    """The folder of a module, as a path."""
    path = ROOT.joinpath(*module.split("."))
    return (path if path.is_dir() else path.parent).relative_to(ROOT).as_posix()


def imported_modules(file: str) -> set[str]:
    """Absolute names of the modules that a file imports, wherever in it."""
    names = set()
    package = file.split("/")[:-1]
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            folder = ROOT.joinpath(*module.split("."))
            for alias in node.names:
                inside = folder / alias.name
                is_module = inside.is_dir() or inside.with_suffix(".py").is_file()
                names.add(f"{module}.{alias.name}" if is_module else module)
    return names


@pytest.mark.parametrize("file", list_files())
def test_a_room_imports_only_what_it_may(file):
    room = str(Path(file).parent)
    allowed = IMPORTS[room] | {room}
    for module in imported_modules(file):
        if module.split(".")[0] not in PACKAGES:
            continue
        other = room_of(module)
        if (file, other) in EXCEPTIONS or module.replace(".", "/") in allowed:
            continue
        assert other in allowed, f"{file} imports {module}"


def test_exceptions_are_needed():
    for file, other in EXCEPTIONS:
        assert other in {room_of(module) for module in imported_modules(file) if module.split(".")[0] in PACKAGES}


def test_the_top_level_is_what_a_hub_repository_bundles():
    found = {path.stem for name in PACKAGES[:2] for path in (ROOT / name).glob("*.py")}
    assert found - NAMES == collect_modules().keys() - SEAMS


@pytest.mark.parametrize("name", sorted(collect_modules().keys() - SEAMS))
def test_bundled_files_import_only_what_a_hub_repository_has(name):
    (path,) = (path for package in PACKAGES[:2] for path in (ROOT / package).glob(f"{name}.py"))
    for module in imported_modules(path.relative_to(ROOT).as_posix()):
        first, last = module.split(".")[0], module.split(".")[-1]
        if first in PACKAGES:
            assert last in collect_modules(), module
        else:
            assert first in HUB_PACKAGES | sys.stdlib_module_names, module


def read_imports(text: str) -> set[tuple[str, str]]:
    """(module, name) of what the Python blocks of a text import of ours."""
    found = set()
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                found |= {(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {(alias.name, "") for alias in node.names}
    return {(module, name) for module, name in found if module.split(".")[0] in PACKAGES}


def test_readmes_use_the_doors_and_nothing_else():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("*_llava/**/README.md"))]
    for module, name in set().union(*map(read_imports, texts)):
        assert module in DOORS and name in ("", *import_module(module).__all__), (module, name)
    for door in DOORS:
        for name in import_module(door).__all__:
            assert any(re.search(rf"\b{name}\b", text) for text in texts), f"no README names {name} of {door}"
