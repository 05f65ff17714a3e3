"""Two processes, or steps that gather several batches, take the same steps as one process with all rows at once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import train
from tests.conftest import ROOT
from tests.modeling_llava.training.conftest import write_recipe

TRAINER = {"learning_rate": 3e-3, "num_train_epochs": 2, "logging_steps": 1, "disable_tqdm": True}
RUN = "import sys; from modeling_llava.cli import main; main(['train', sys.argv[1]])"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-4, msg=name)


def run_recipe(folder: Path, out: Path, **fields) -> dict[str, torch.Tensor]:
    train(read_recipe(write_recipe(folder, output_dir=str(out), **fields)))
    return weights_of(out)


def test_four_small_batches_a_step_are_one_large_one(workspace, tmp_path):
    """12 rows: 3 at a time and four batches a step, or all at once. Only the mean over all tokens makes them equal."""
    large = run_recipe(workspace, tmp_path / "large", trainer=TRAINER | {"per_device_train_batch_size": 12})
    small = TRAINER | {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    assert_close(run_recipe(workspace, tmp_path / "small", trainer=small), large)


@pytest.mark.parametrize("packing", [{}, {"tokens_per_batch": 300}])
def test_two_processes_are_one_with_twice_the_batches(workspace, tmp_path, packing):
    sizes = {} if packing else {"per_device_train_batch_size": 3}
    one = TRAINER | sizes | {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}
    expected = run_recipe(workspace, tmp_path / "one", trainer=one, **packing)
    two = TRAINER | sizes | {"train_sampling_strategy": "sequential"}
    recipe = write_recipe(workspace, output_dir=str(tmp_path / "two"), trainer=two, **packing)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    result = subprocess.run(
        [*command, sys.executable, "-c", RUN, str(recipe)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert_close(weights_of(tmp_path / "two"), expected)
