"""Compiled blocks take the same steps; the compiler needs a C++ compiler, which a machine may lack."""

import csv
import shutil
from pathlib import Path

import pytest
import torch

from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import train
from tests.modeling_llava.training.conftest import write_recipe

TRAINER = {"learning_rate": 3e-3, "max_steps": 3, "logging_steps": 1, "disable_tqdm": True}


def losses_of(folder: Path) -> list[float]:
    with (folder / "progress.csv").open(newline="") as file:
        return [float(line["loss"]) for line in csv.DictReader(file)]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
# torch's compiler warns of its own code
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "fields",
    [
        {"trainer": TRAINER | {"per_device_train_batch_size": 12}},
        {"trainer": TRAINER | {"gradient_checkpointing": True}, "tokens_per_batch": 4096},
    ],
    ids=["padded", "packed and checkpointed"],
)
def test_compiled_blocks_give_the_same_losses(workspace, tmp_path, fields):
    train(read_recipe(write_recipe(workspace, **fields, output_dir=str(tmp_path / "plain"))))
    torch._dynamo.utils.counters.clear()
    recipe = write_recipe(workspace, **fields, compile_blocks=True, output_dir=str(tmp_path / "compiled"))
    train(read_recipe(recipe))
    counted = torch._dynamo.utils.counters
    # Both layers share their programs.
    assert 0 < counted["stats"]["unique_graphs"] <= 4
    plain, compiled = (losses_of(tmp_path / name) for name in ("plain", "compiled"))
    assert plain[0] > plain[-1]
    assert compiled == pytest.approx(plain, abs=1e-4)
