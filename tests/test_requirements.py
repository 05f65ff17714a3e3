"""What is imported is required: by the package itself, or by the extra of the command that needs it."""

import ast
import configparser
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import get_session
from packaging.requirements import Requirement
from safetensors.torch import save_file

from modeling_llava.commands.errors import EXTRAS
from modeling_llava.export.hub_upload import CLIENT_ERROR
from tests.conftest import ROOT
from tests.tiny import save_tiny_checkpoint

PACKAGES = ("modeling_llava", "processing_llava", "spaces_demo", "hub_cards")
NAMES = {"PIL": "pillow", "yaml": "pyyaml", "google": "protobuf"}
"""Distributions that are called otherwise than their module."""
EXTRA_OF = {
    "modeling_llava/training": "train",
    "processing_llava/data/data_bounds.py": "train",
    "processing_llava/data/row_datasets.py": "train",
    "modeling_llava/serving/engine_thread.py": "serve",
    "modeling_llava/serving/guard.py": "demo",
    "modeling_llava/serving/openai_server.py": "serve",
    "modeling_llava/serving/vllm_config.py": "vllm",
    "modeling_llava/serving/vllm_model.py": "vllm",
    "modeling_llava/serving/vllm_renderer.py": "vllm",
    "spaces_demo/app.py": "demo",
    "spaces_demo/handlers.py": "demo",
    "spaces_demo/routes.py": "demo",
    "spaces_demo/safety.py": "demo",
    "spaces_demo/theme.py": "demo",
}
"""Files that nothing but a command with this extra imports."""

SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "setup.cfg")


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_names(text: str) -> set[str]:
    return {normalise(Requirement(line).name) for line in text.strip().splitlines()}


BASE = read_names(SETTINGS["options"]["install_requires"])
REQUIRED = {extra: BASE | read_names(text) for extra, text in SETTINGS["options.extras_require"].items()} | {"": BASE}


def list_files() -> list[str]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    # The builders of the embedded model do not ship.
    return sorted(path.relative_to(ROOT).as_posix() for path in files if "tiny_llava" not in path.parts)


def find_imports(path: str) -> tuple[set[str], set[str]]:
    """Packages of others that a file always imports, and those that it imports in a function or under a condition."""
    tree = ast.parse((ROOT / path).read_text())
    later = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, (ast.FunctionDef, ast.AsyncFunctionDef, ast.If, ast.Try))
        for node in ast.walk(block)
    }
    found: tuple[set[str], set[str]] = (set(), set())
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        found[id(node) in later].update(name.split(".")[0] for name in names)
    return found[0] - OURS, found[1] - OURS


OURS = {*sys.stdlib_module_names, *PACKAGES}


@pytest.mark.parametrize("path", list_files())
def test_what_a_file_imports_is_required(path):
    extra = next((extra for place, extra in EXTRA_OF.items() if path.startswith(place)), "")
    always, later = find_imports(path)
    missing = {name for name in always if normalise(NAMES.get(name, name)) not in REQUIRED[extra]}
    assert not missing, f"{path} imports {missing}, which [{extra}] of setup.cfg does not require"
    for name in always | later:
        if normalise(NAMES.get(name, name)) not in BASE:
            assert name in EXTRAS, f"{path} imports {name}: the command does not know what pip has to install for it"


def list_installed(names: set[str]) -> set[str]:
    """Distributions that pip installs for these: what they require, and so on."""
    found, waiting = set(), set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        try:
            requirements = map(Requirement, distribution(name).requires or [])
        except PackageNotFoundError:
            continue
        needed = {
            normalise(item.name) for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})
        }
        waiting |= needed - found
    return found


@pytest.fixture(scope="module")
def base_environment(tmp_path_factory) -> dict[str, str]:
    """Variables with which Python finds what the base installation has, and nothing else (with -S)."""
    site = tmp_path_factory.mktemp("site")
    for name in list_installed(BASE):
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:
            continue
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(distribution(name).locate_file(top)))
    # For the version that cards name.
    (site / "anyllava-0.1.0.dist-info").mkdir()
    (site / "anyllava-0.1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: anyllava\nVersion: 0.1.0\n"
    )
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "model"))


BUS = str(ROOT / "spaces_demo" / "examples" / "twemoji-bus.png")
PUSH = ["push", "MODEL", "--repo-id", "me/x", "--license", "mit", "--base-model", "a/b", "--dry-run"]
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
RUNS = (
    (["ask", BUS, "What?", "--model", "MODEL", "--max-new-tokens", "2"], 0, ""),
    (["chat", BUS, "--model", "MODEL"], 0, "/image PATH"),
    (["doctor", "--model", "MODEL"], 0, "torch"),
    (["check-data", "rows.json", "--model", "MODEL"], 0, "usable rows"),
    (
        ["push", "MODEL", "--repo-id", "me/x", "--license", "mit", "--base-model", "a/b", "--dry-run"],
        0,
        "nothing was sent",
    ),
    (["train", "recipe.yaml"], 2, "pip install 'anyllava[train]'"),
    (["merge", "adapter", "--out", "merged"], 2, "pip install 'anyllava[train]'"),
    (["export", "MODEL", "--out", "out", "--layout", "gguf"], 2, "pip install 'anyllava[gguf]'"),
    (["demo", "--model", "MODEL"], 2, "pip install 'anyllava[demo]'"),
)


@pytest.mark.parametrize("arguments, code, printed", RUNS, ids=[arguments[0] for arguments, _, _ in RUNS])
def test_commands_run_in_the_base_installation_or_name_their_extra(
    arguments, code, printed, base_environment, model, tmp_path
):
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "a", "messages": TURNS}]))
    recipe = f"stage: lora\nmodel: {model}\ndata: [{{path: rows.json}}]\noutput_dir: out\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    save_file(
        {"base_model.model.model.language_model.x.lora_A.weight": torch.zeros(1)},
        tmp_path / "adapter/adapter_model.safetensors",
    )
    arguments = [model if argument == "MODEL" else argument for argument in arguments]
    command = [sys.executable, "-S", "-m", "modeling_llava.cli", *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=base_environment, stdin=subprocess.DEVNULL
    )
    assert (result.returncode, "Traceback" in result.stderr) == (code, False), result.stderr
    assert printed in result.stdout + result.stderr


def test_a_lost_connection_is_what_push_expects_whichever_client_huggingface_hub_has():
    client = import_module(type(get_session()).__module__.split(".")[0])
    assert issubclass(client.ConnectError, CLIENT_ERROR)
