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
from tests.tiny import VOCAB_SIZE, tiny_config


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
    stand_ins = {
        "vllm.config": {"ModelConfig": object},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.config": {
            "MODELS_CONFIG_MAP": found.setdefault("MODELS_CONFIG_MAP", {}),
            "VerifyAndUpdateConfig": object,
        },
    }
    for module, names in stand_ins.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**names))
    yield found
    sys.modules.pop("modeling_llava.serving.vllm_config", None)


def test_a_second_call_registers_nothing(registries):
    for _ in range(2):
        register()
    assert {name: list(registry) for name, registry in registries.items()} == {
        "ModelRegistry": [ARCHITECTURE],
        "TokenizerRegistry": [TOKENIZER_MODE],
        "RENDERER_REGISTRY": [TOKENIZER_MODE],
        "MODELS_CONFIG_MAP": [ARCHITECTURE],
    }


@pytest.mark.parametrize("mode, image_token_id, vocab_size", [("any_llava", 300, 301), ("auto", 299, 300)])
def test_the_id_of_images_is_counted_and_another_mode_is_one_line(
    mode, image_token_id, vocab_size, registries, caplog
):
    register()
    config = tiny_config(image_token_id=image_token_id)
    settings = SimpleNamespace(hf_config=config, tokenizer_mode=mode, get_model_arch_config=lambda: "anew")
    registries["MODELS_CONFIG_MAP"][ARCHITECTURE].verify_and_update_model_config(settings)
    assert (config.text_config.num_stored_tokens, config.text_config.vocab_size) == (VOCAB_SIZE, vocab_size)
    assert settings.model_arch_config == "anew"
    lines = [record.getMessage() for record in caplog.records if "--tokenizer-mode any_llava" in record.getMessage()]
    assert len(lines) == (mode != "any_llava")


def test_another_version_of_vllm_goes_on_without_us(registries, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm.renderers.registry", None)
    register()
    assert not any(registries.values())
    (line,) = (record.getMessage() for record in caplog.records)
    assert "vllm.renderers.registry" in line and "expected 0.32" in line


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
