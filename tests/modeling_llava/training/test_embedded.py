"""Adapters of the embedded model work from any working directory, on any machine."""

import contextlib
import json
from pathlib import Path

import pytest

from modeling_llava import AutoModelForVision2Seq
from modeling_llava.checkpoints.model_names import load_training_processor
from modeling_llava.cli import main
from modeling_llava.inference.loading import EMBEDDED_MODEL
from processing_llava.original.original_folder import EMBEDDED_NAME, SHORT_NAME, find_installed, name_installed
from spaces_demo.models import ModelMenu
from tests.conftest import ROOT

EXAMPLES = ROOT / "spaces_demo" / "examples"
RECIPE = """
stage: lora
model: {model}
data: [{{path: rows.json, image_folder: {images}}}]
output_dir: adapter
lora: {{r: 2, lora_alpha: 64}}
trainer: {{max_steps: 5, learning_rate: 0.05, report_to: none, disable_tqdm: true}}
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    """Trained in an empty folder, on the folder of the embedded model."""
    folder = tmp_path_factory.mktemp("empty")
    turns = [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A bus."}]
    rows = [{"id": "a", "image": "twemoji-bus.png", "conversations": turns}]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "recipe.yaml").write_text(RECIPE.format(model=EMBEDDED_MODEL, images=EXAMPLES))
    with contextlib.chdir(folder):
        assert main(["train", "recipe.yaml"]) == 0
    return str(folder / "adapter")


def test_its_base_is_named_as_any_machine_finds_it(adapter):
    assert json.loads(Path(adapter, "adapter_config.json").read_text())["base_model_name_or_path"] == EMBEDDED_NAME
    assert json.loads(Path(adapter, "training_record.json").read_text())["base_model"] is None


@pytest.mark.parametrize("name", [EMBEDDED_NAME, f"./{EMBEDDED_NAME}/", "modeling_llava//tiny_llava/./checkpoint"])
def test_spellings_of_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_installed(name) == EMBEDDED_MODEL == str(ROOT / EMBEDDED_NAME)
    assert name_installed(find_installed(name)) == EMBEDDED_NAME
    assert find_installed("me/checkpoint") == name_installed("me/checkpoint") == "me/checkpoint"


@pytest.mark.parametrize("place", [ROOT, ROOT / "tests"])
def test_every_door_finds_its_base_from_anywhere(place, adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    loaded = AutoModelForVision2Seq.from_pretrained(adapter, dtype="float32")
    assert loaded._hf_peft_config_loaded
    menu = ModelMenu([adapter])
    menu.load(menu.labels[0])
    guitar = str(EXAMPLES / "twemoji-guitar.png")
    capsys.readouterr()
    assert main(["ask", guitar, "What is this?", "--model", adapter, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip() != "a guitar"
    assert main(["doctor", "--model", adapter]) == 0
    assert main(["merge", adapter, "--out", str(tmp_path / "merged")]) == 0
    assert main(["export", adapter, "--out", str(tmp_path / "out"), "--license", "mit"]) == 2
    assert "which is no model on the Hub" in capsys.readouterr().err


@pytest.mark.parametrize("name", [EMBEDDED_NAME, SHORT_NAME])
def test_the_name_stands_for_the_embedded_model_everywhere(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    arguments = [str(EXAMPLES / "twemoji-guitar.png"), "What is this?", "--model", name]
    assert main(["ask", *arguments]) == 0
    assert capsys.readouterr().out.strip() == "a guitar"
    assert main(["doctor", "--model", name]) == 0
    assert load_training_processor(name).chat_template == load_training_processor(EMBEDDED_MODEL).chat_template
    facts = ["--license", "apache-2.0", "--base-model", "facebook/dinov2-small", "--repo-id", "me/pictures"]
    assert main(["export", name, "--out", str(tmp_path / "out"), *facts]) == 0
    models = ModelMenu([name], device="cpu")
    models.load(*models.labels)


def test_a_folder_that_is_called_so_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / SHORT_NAME).mkdir()
    assert find_installed(SHORT_NAME) == SHORT_NAME
