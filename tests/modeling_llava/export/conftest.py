"""Trained folders to export, and a Python that cannot import this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
import yaml

from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import train
from tests.tiny import save_tiny_checkpoint

MANIFEST = [
    {
        "name": "three coloured squares",
        "kind": "synthetic",
        "made_by": "a test",
        "license": "cc-by-nc-4.0",
        "rows": 6,
        "images": 3,
        "personal_data": "none",
        "contact": "nobody@example.org",
    }
]
BLOCKED = """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_llava", "processing_llava", "hub_cards", "spaces_demo", "tests"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocker())
"""
"""The package is installed in place, so its import has to be blocked."""


def run_python(code: str, folder: Path, *, blocked: bool = True, **environment: str) -> str:
    """The output of Python code that runs in `folder` and, if `blocked`, cannot import this package.

    It has as many threads as this process: some CPUs sum in another order with fewer.
    """
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    kept = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf_home")} | threads
    result = subprocess.run(
        [sys.executable, "-c", BLOCKED + code if blocked else code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | kept | environment,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """A model to start from, six rows about three pictures, and what the data manifest says of them."""
    folder = tmp_path_factory.mktemp("export_workspace")
    records = []
    for color in ("red", "blue", "white"):
        PIL.Image.new("RGB", (40, 30), color).save(folder / f"{color}.png")
        question, answer = {"from": "human", "value": "<image>\nColor?"}, {"from": "gpt", "value": f"{color}."}
        records.append({"id": color, "image": f"{color}.png", "conversations": [question, answer]})
    (folder / "rows.json").write_text(json.dumps(records * 2))
    (folder / "manifest.yaml").write_text(yaml.safe_dump(MANIFEST))
    save_tiny_checkpoint(folder / "start")
    return folder


def train_tiny(workspace: Path, stage: str, **fields) -> Path:
    """The output folder of a short run."""
    recipe = {
        "stage": stage,
        "model": str(workspace / "start"),
        "data": [{"path": str(workspace / "rows.json"), "image_folder": str(workspace)}],
        "data_manifest": str(workspace / "manifest.yaml"),
        "output_dir": str(workspace / stage),
        "trainer": {
            "learning_rate": 3e-3,
            "per_device_train_batch_size": 3,
            "max_steps": 2,
            "logging_steps": 1,
            "disable_tqdm": True,
        },
    }
    path = workspace / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(recipe | fields))
    return train(read_recipe(path))


@pytest.fixture(scope="session")
def trained(workspace) -> Path:
    """A model that was trained whole."""
    return train_tiny(workspace, "finetune", max_length=400, projector_learning_rate=1e-4)


@pytest.fixture(scope="session")
def adapter(workspace) -> Path:
    """A LoRA with its projector."""
    return train_tiny(workspace, "lora", lora={"r": 4, "lora_alpha": 8})
