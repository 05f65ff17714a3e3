"""A run that is killed goes on where its last complete checkpoint stands, as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import train
from tests.conftest import ROOT
from tests.modeling_llava.training.conftest import write_recipe

NUM_STEPS = 8
KILLED_AT = 3
TRAINER = {
    "learning_rate": 3e-3,
    "max_steps": NUM_STEPS,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 1,
    "disable_tqdm": True,
}
RUN_AND_STOP = """
import sys, time

def stop():
    print("stopped", flush=True)
    time.sleep(600)

{moment}

from modeling_llava.cli import main
main(["train", sys.argv[1]])
"""
"""`llava train` that stands still at one moment, until it is killed."""
MOMENTS = {
    "weights": f"""
from transformers import Trainer

write_weights = Trainer.save_model

def write_weights_and_stop(self, output_dir=None, _internal_call=False):
    write_weights(self, output_dir, _internal_call)
    if output_dir.endswith("checkpoint-{KILLED_AT}"):
        stop()

Trainer.save_model = write_weights_and_stop
""",
    "optimizer": f"""
import torch

write = torch.save

def stop_before_the_schedule(value, path, *args, **kwargs):
    if str(path).endswith("checkpoint-{KILLED_AT}/scheduler.pt"):
        stop()
    write(value, path, *args, **kwargs)

torch.save = stop_before_the_schedule
""",
    "rotation": f"""
import pathlib, shutil

remove = shutil.rmtree

def remove_half(path, *args, **kwargs):
    if str(path).endswith("checkpoint-{KILLED_AT - 1}"):
        (pathlib.Path(path) / "model.safetensors").unlink()
        stop()
    remove(path, *args, **kwargs)

shutil.rmtree = remove_half
""",
    "end": """
from transformers import PreTrainedConfig

write = PreTrainedConfig.save_pretrained

def stop_before_the_weights(self, folder, *args, **kwargs):
    write(self, folder, *args, **kwargs)
    if str(folder).endswith("killed"):
        stop()

PreTrainedConfig.save_pretrained = stop_before_the_weights
""",
}
"""In the middle of writing a checkpoint, of removing an old one, and of writing the trained model."""


def run_and_kill(recipe: Path, moment: str) -> None:
    command = [sys.executable, "-c", RUN_AND_STOP.format(moment=MOMENTS[moment]), str(recipe)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert any("stopped" in line for line in process.stdout)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def assert_same_run(found: Path, expected: Path, weights: str) -> None:
    assert losses_of(found) == losses_of(expected)
    expected_weights, found_weights = load_file(expected / weights), load_file(found / weights)
    assert expected_weights.keys() == found_weights.keys()
    assert all(expected_weights[name].equal(found_weights[name]) for name in expected_weights)


def losses_of(folder: Path) -> list[float]:
    state = json.loads((folder / f"checkpoint-{NUM_STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


# from Python 3.12 on, forking a process with threads warns
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"tokens_per_batch": 300}, marks=pytest.mark.slow),
        {"tokens_per_batch": 300, "stage": "lora"},
        pytest.param({"trainer": TRAINER | {"per_device_train_batch_size": 5}}, marks=pytest.mark.slow),
        {"trainer": TRAINER | {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}, "streaming": True},
    ],
    ids=["packed", "packed lora", "padded", "streaming"],
)
def test_killed_run_ends_as_an_uninterrupted_one(workspace, tmp_path, fields, num_workers):
    """Also where processes of their own prepare its batches, which the uninterrupted run makes itself."""
    weights = "adapter_model.safetensors" if "stage" in fields else "model.safetensors"
    source = {"path": str(workspace / "rows.json"), "image_folder": str(workspace)}
    fields = {"trainer": TRAINER, "data": [source]} | fields
    source["streaming"] = fields.pop("streaming", False)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(read_recipe(write_recipe(workspace, **fields, output_dir=str(straight))))

    fields["trainer"] = fields["trainer"] | {"dataloader_num_workers": num_workers}
    recipe = write_recipe(workspace, **fields, output_dir=str(killed))
    run_and_kill(recipe, "weights")
    assert (killed / f"checkpoint-{KILLED_AT}" / weights).exists()
    assert not (killed / f"checkpoint-{KILLED_AT}" / "trainer_state.json").exists()
    written = (killed / f"checkpoint-{KILLED_AT - 1}" / weights).stat().st_mtime_ns

    train(read_recipe(recipe), resume=True)
    assert (killed / f"checkpoint-{KILLED_AT - 1}" / weights).stat().st_mtime_ns == written
    assert_same_run(killed, straight, weights)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["optimizer", "rotation", "end"])
def test_every_moment_is_one_to_be_killed_at(workspace, tmp_path, moment):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    fields = {"tokens_per_batch": 300, "trainer": TRAINER | ({"save_total_limit": 1} if moment == "rotation" else {})}
    train(read_recipe(write_recipe(workspace, **fields, output_dir=str(straight))))
    recipe = write_recipe(workspace, **fields, output_dir=str(killed))
    run_and_kill(recipe, moment)
    assert not (killed / "model.safetensors").exists()
    train(read_recipe(recipe), resume=True)
    assert_same_run(killed, straight, "model.safetensors")


def test_streaming_without_a_number_of_steps_is_refused(workspace, tmp_path):
    data = [{"path": str(workspace / "rows.json"), "image_folder": str(workspace), "streaming": True}]
    recipe = write_recipe(workspace, data=data, trainer={"num_train_epochs": 1}, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="got streaming data, .* set max_steps"):
        train(read_recipe(recipe))
