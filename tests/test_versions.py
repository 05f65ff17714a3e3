"""What setup.cfg promises of versions, and that models of ours mean the same under all of them."""

import configparser
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from modeling_llava import AutoModelForVision2Seq
from modeling_llava.image_encoder import DINOV2_NAMES
from processing_llava import transformers_versions
from tests.conftest import ROOT
from tests.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.core

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
EXTRAS = {name: text for name, text in SETUP["options.extras_require"].items() if name != "vllm"}
"""vLLM comes into an environment of its own, with its own versions of the others: `make test-vllm`."""
REQUIREMENTS = "".join([SETUP["options"]["install_requires"], *EXTRAS.values()])


def read_pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_oldest_versions_are_those_that_are_tested():
    floors = dict(re.findall(r"^([\w-]+)>=([\d.]+)", REQUIREMENTS, flags=re.MULTILINE))
    pins = read_pins(".ci/constraints-floor.txt")
    assert floors.keys() == pins.keys()
    assert {name: pin for name, pin in pins.items() if not pin.startswith(floors[name])} == {}


def test_the_tested_versions_are_in_the_range():
    major, minor = map(int, read_pins("constraints.txt")["transformers"].split(".")[:2])
    assert transformers_versions.FIRST <= (major, minor) <= transformers_versions.LAST
    first = ".".join(map(str, transformers_versions.FIRST))
    assert f"transformers>={first}," in REQUIREMENTS


@pytest.mark.parametrize(
    "version, is_named",
    [((5, 16), True), ((5, 20), False), *(pytest.param(v, True, marks=pytest.mark.slow) for v in ((5, 99), (6, 0)))],
)
def test_another_version_is_named_once_and_runs(version, is_named):
    pretend = f"from processing_llava import transformers_versions as versions; versions.VERSION = {version}; "
    code = pretend + "import modeling_llava; modeling_llava.AutoModelForVision2Seq; print('runs')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "runs" in result.stdout, result.stderr
    assert result.stderr.count("AnyLLaVA is tested with 5.17 to 5.24") == is_named


def swap_dinov2_names(key: str) -> str:
    for new, old in DINOV2_NAMES.items():
        for before, after in ((new, old), (old, new)):
            swapped, found = re.subn(rf"(layer\.\d+\.attention\.){before}\b", rf"\1{after}", key)
            if found:
                return swapped
    return key


@pytest.mark.parametrize("vision", ["dinov2", "dinov2_with_registers"])
@pytest.mark.parametrize("auto_class", [AutoModelForVision2Seq, AutoModel])
def test_a_model_that_another_version_wrote_has_all_its_weights(tmp_path, vision, auto_class):
    """transformers 5.18 renamed what DINOv2 calls its weights."""
    folder = save_tiny_checkpoint(tmp_path / "own", vision=vision)
    weights = load_file(folder / "model.safetensors")
    swapped = {swap_dinov2_names(key): weight for key, weight in weights.items()}
    assert swapped.keys() != weights.keys()
    expected = auto_class.from_pretrained(folder).state_dict()
    save_file(swapped, folder / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(auto_class.from_pretrained(folder).state_dict(), expected, rtol=0, atol=0)
