"""The table of private and undocumented names: complete, and as they are in the installed versions."""

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, ProcessorMixin, Trainer
from transformers.image_processing_backends import PilBackend

from processing_llava.transformers_versions import VERSION
from tests.conftest import ROOT
from tests.upstream_names import UPSTREAM_NAMES

PACKAGES = ("modeling_llava", "processing_llava", "hub_cards", "spaces_demo")
UPSTREAM_CLASSES = (GenerationMixin, PreTrainedConfig, PreTrainedModel, ProcessorMixin, Trainer, PilBackend)
DOCUMENTED_NAMES = {"_asdict", "_fields_"}
"""Of Python's namedtuple and ctypes.Structure."""


def find(path: str) -> Any:
    """What a dotted path names; a field of an instance counts as a value."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(path)


FIELDS_OF_INSTANCES = (
    "transformers.CompileConfig._compile_all_devices",
    "transformers.GenerationConfig._pad_token_tensor",
)


def describe(path: str) -> str:
    """The names of its parameters, or that it is a value."""
    if path in FIELDS_OF_INSTANCES:
        owner, _, name = path.rpartition(".")
        assert name in Path(inspect.getsourcefile(find(owner))).read_text() or name in inspect.getsource(
            GenerationMixin
        )
        return "a value"
    found = find(path)
    if not callable(found):
        return "a value"
    try:
        return ", ".join(inspect.signature(found).parameters)
    except ValueError:
        return "no signature"


def expected_signature(signatures: dict[str, str]) -> str:
    known = {tuple(map(int, first.split("."))): text for first, text in signatures.items()}
    return known[max(first for first in known if first <= max(VERSION, min(known)))]


@pytest.mark.core
@pytest.mark.parametrize("name", UPSTREAM_NAMES, ids=lambda name: name.path)
def test_the_name_is_what_it_was(name):
    assert describe(name.path) == expected_signature(name.signatures), f"transformers {transformers.__version__}"


@pytest.mark.parametrize("name", UPSTREAM_NAMES, ids=lambda name: name.path)
def test_the_files_use_the_name(name):
    word = name.path.rpartition(".")[2]
    assert all(word in (ROOT / file).read_text() for file in name.files)


def read_private_names(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Names with one leading underscore that a file reads or overrides, and those that it defines."""
    used, defined = set(), set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name, ctx=context):
                used.add(name)
                if isinstance(context, ast.Store):
                    defined.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                used.add(name)
                defined.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                used.add(name)
                defined.add(name)
            case ast.ImportFrom(level=0, names=aliases):
                used |= {alias.name for alias in aliases}
    return tuple({name for name in names if name.startswith("_") and name[1:2] != "_"} for names in (used, defined))


def test_no_private_name_is_missing():
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    names = {file.relative_to(ROOT).as_posix(): read_private_names(ast.parse(file.read_text())) for file in files}
    own = set().union(*(defined for _, defined in names.values()))
    inherited = {name for name in own if any(name in dir(upstream) for upstream in UPSTREAM_CLASSES)}
    known = {(file, part) for name in UPSTREAM_NAMES for file in name.files for part in name.path.split(".")}
    private = {
        (file, name)
        for file, (used, _) in names.items()
        for name in used - DOCUMENTED_NAMES
        if name not in own or name in inherited
    }
    assert sorted(private - known) == []
