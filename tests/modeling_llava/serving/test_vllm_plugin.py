"""The plugin of vLLM without vLLM: it is found, costs little, and registers once. tests/vllm_suite has the rest."""

import ast
import configparser
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest

from modeling_llava.serving.vllm_plugin import ARCHITECTURE, TOKENIZER_MODE, register
from tests.conftest import ROOT


class Registry(dict):
    """What the plugin asks of vLLM's three registries; a second registration is an error."""

    tokenizers = renderers = property(lambda self: self)

    def get_supported_archs(self):
        return self.keys()

    def register(self, name: str, *place: str) -> None:
        assert name not in self
        self[name] = place

    register_model = register


@pytest.fixture
def registries(monkeypatch):
    found = {name: Registry() for name in ("ModelRegistry", "TokenizerRegistry", "RENDERER_REGISTRY")}
    for module in ("vllm", "vllm.tokenizers", "vllm.renderers"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    sys.modules["vllm"].ModelRegistry = found["ModelRegistry"]
    for name, key in (("tokenizers", "TokenizerRegistry"), ("renderers", "RENDERER_REGISTRY")):
        monkeypatch.setitem(sys.modules, f"vllm.{name}.registry", SimpleNamespace(**{key: found[key]}))
    return found


def test_a_second_call_registers_nothing(registries):
    for _ in range(2):
        register()
    assert {name: list(registry) for name, registry in registries.items()} == {
        "ModelRegistry": [ARCHITECTURE],
        "TokenizerRegistry": [TOKENIZER_MODE],
        "RENDERER_REGISTRY": [TOKENIZER_MODE],
    }


def test_what_is_registered_is_in_our_files(registries):
    register()
    model = registries["ModelRegistry"][ARCHITECTURE][0].split(":")
    for module, name in (model, registries["RENDERER_REGISTRY"][TOKENIZER_MODE]):
        with open(find_spec(module).origin, encoding="utf-8") as file:
            classes = [node.name for node in ast.parse(file.read()).body if isinstance(node, ast.ClassDef)]
        assert name in classes


def test_the_entry_point_is_the_function():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    (line,) = settings["options.entry_points"]["vllm.general_plugins"].strip().splitlines()
    module, name = line.split(" = ")[1].split(":")
    assert getattr(import_module(module), name) is register


def test_its_import_loads_no_classes_and_no_vllm():
    code = (
        "import sys, modeling_llava.serving.vllm_plugin; "
        "print(*sys.modules.keys() & {'vllm', 'modeling_llava.auto', 'modeling_llava.modeling_llava', 'peft'})"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed.strip() == ""
