"""A run that is killed goes on where its last complete checkpoint stands, as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import find_checkpoint, train
from tests.conftest import ROOT
from tests.modeling_llava.training.conftest import write_recipe

NUM_STEPS = 8
TRAINER = {
    "learning_rate": 3e-3,
    "max_steps": NUM_STEPS,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 1,
    "disable_tqdm": True,
}


def losses_of(folder: Path) -> list[float]:
    state = json.loads((folder / f"checkpoint-{NUM_STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("fields", [{"tokens_per_batch": 300}, {"tokens_per_batch": 300, "stage": "lora"}])
def test_killed_run_ends_as_an_uninterrupted_one(workspace, tmp_path, fields):
    weights = "adapter_model.safetensors" if "stage" in fields else "model.safetensors"
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(read_recipe(write_recipe(workspace, **fields, trainer=TRAINER, output_dir=str(straight))))

    recipe = write_recipe(workspace, **fields, trainer=TRAINER, output_dir=str(killed))
    code = f"from modeling_llava.cli import main; main(['train', {str(recipe)!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    # Wherever the third checkpoint happens to be: most often in the middle of being written.
    while not (killed / "checkpoint-3").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / weights).exists()
    checkpoint = find_checkpoint(str(killed))
    assert checkpoint is not None

    train(read_recipe(recipe), resume=True)
    assert losses_of(killed) == losses_of(straight)
    expected, found = load_file(straight / weights), load_file(killed / weights)
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)


def test_incomplete_checkpoints_are_left_out(tmp_path):
    assert find_checkpoint(str(tmp_path)) is None
    for step, content in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (11, '{"global_st'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if content is not None:
            (folder / "trainer_state.json").write_text(content)
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
