"""The wheel is the product: alone, in a fresh environment without the repository, it does what README says."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "spaces_demo" / "examples"
# What belongs to this process: the checkout, and the versions of constraints.txt.
NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_CONSTRAINT")


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=kept | variables, capture_output=True, text=True, timeout=1500
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    if "No matching distribution found for setuptools" in built.stderr:
        pytest.skip("needs a package index, to build a wheel: none can be reached")
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_what_runs_and_no_more(wheel):
    assert wheel.stat().st_size <= 30e6
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert packages == {"hub_cards", "modeling_llava", "processing_llava", "spaces_demo"}
    assert {f"{package}/py.typed" for package in packages} <= set(names)
    assert {name for name in names if name.startswith("modeling_llava/tiny_llava/")} == {
        f"modeling_llava/tiny_llava/checkpoint/{path.name}" for path in Path(ROOT, EMBEDDED).iterdir()
    }
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests/", "benchmarks/"))]
    # Whatever else lies in the packages ships.
    listed = run("git", "ls-files", *packages, cwd=ROOT).stdout.splitlines()
    builders = {name for name in listed if re.fullmatch(r"modeling_llava/tiny_llava/(\w+\.py|recipes/.*)", name)}
    assert set(listed) - builders <= set(names)


EMBEDDED = "modeling_llava/tiny_llava/checkpoint"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Programs of a fresh environment with the newest of everything but torch, of which some builds are gigabytes."""
    folder = tmp_path_factory.mktemp("environment")
    assert run(sys.executable, "-m", "venv", folder / "venv", cwd=folder).returncode == 0
    pip = [folder / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet"]
    torch = importlib.metadata.version("torch").partition("+")[0]
    # README's own line, with the wheel in place of the checkout.
    (extras,) = re.findall(r"^pip install '\.(\[[a-z,]+\])'", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    for requirements in ([f"torch=={torch}"], [f"{wheel}{extras}"]):
        result = run(*pip, *requirements, cwd=folder)
        if "No matching distribution found" in result.stderr or "Max retries exceeded" in result.stderr:
            pytest.skip(f"needs a package index that has {requirements[0]}: none can be reached")
        assert result.returncode == 0, result.stderr
    return folder / "venv" / "bin"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """An empty folder of somebody who has pictures and a wheel."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("guitar", "penguin"):
        shutil.copy(EXAMPLES / f"twemoji-{name}.png", folder / f"{name}.png")
    rows = [
        {"id": name, "image": f"{name}.png", "conversations": [
            {"from": "human", "value": "<image>\nCan I play on it?"}, {"from": "gpt", "value": answer}
        ]}
        for name, answer in (("guitar", "Yes: it is a guitar."), ("penguin", "No: it is a penguin."))
    ]  # fmt: skip
    (folder / "rows.json").write_text(json.dumps(rows))
    recipe = {
        "stage": "lora",
        "model": EMBEDDED,
        "data": [{"path": "rows.json", "image_folder": "."}],
        "output_dir": "adapter",
        "lora": {"r": 8, "lora_alpha": 16},
        "trainer": {"max_steps": 3, "learning_rate": 2e-3, "report_to": "none"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def llava(installed: Path, workplace: Path, *arguments: str) -> str:
    result = run(installed / "llava", *arguments, cwd=workplace, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_it_answers(installed, workplace):
    assert llava(installed, workplace, "ask", "penguin.png", "What is this?").strip() == "a penguin"
    assert "transformers" in llava(installed, workplace, "doctor")


def test_it_trains_merges_exports_and_pushes(installed, workplace):
    llava(installed, workplace, "check-data", "rows.json", "--image-folder", ".")
    llava(installed, workplace, "train", "recipe.yaml")
    assert llava(installed, workplace, "ask", "guitar.png", "Can I play on it?", "--model", "adapter").strip()
    llava(installed, workplace, "merge", "adapter", "--out", "merged")
    facts = ["--repo-id", "me/pictures", "--license", "apache-2.0", "--base-model", "facebook/dinov2-small"]
    llava(installed, workplace, "export", "merged", "--out", "exported", *facts)
    assert "nothing was sent" in llava(installed, workplace, "push", "merged", *facts, "--dry-run")


def test_it_opens_the_page(installed, workplace):
    assert "a penguin" in llava(installed, workplace, "demo", "--terminal")
    command = [str(installed / "llava"), "demo", "--port", "7965"]
    kept = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    with subprocess.Popen(command, cwd=workplace, env=kept, stdout=subprocess.PIPE, text=True) as page:
        try:
            line = next(line for line in page.stdout if "http" in line)
            with urllib.request.urlopen(re.search(r"http://[\w.:]+", line)[0]) as answer:
                assert answer.status == 200 and b"AnyLLaVA" in answer.read()
        finally:
            page.terminate()
