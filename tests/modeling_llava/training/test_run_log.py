"""The files that say what a run did, and the refusal of a loss that is no number."""

import csv

import PIL.Image
import pytest
import torch

from modeling_llava import AutoModelForVision2Seq
from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import train
from modeling_llava.training.run_log import check_loss
from tests.modeling_llava.training.conftest import write_recipe

TRAINER = {"learning_rate": 1e-3, "max_steps": 4, "logging_steps": 1, "disable_tqdm": True}


def read_lines(folder) -> list[dict[str, str]]:
    with (folder / "progress.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("packed", [True, False])
def test_curves(workspace, tmp_path, packed):
    fields = {"tokens_per_batch": 300} if packed else {}
    sizes = {} if packed else {"per_device_train_batch_size": 4}
    train(read_recipe(write_recipe(workspace, **fields, trainer=TRAINER | sizes, output_dir=str(tmp_path))))
    lines = read_lines(tmp_path)
    assert [int(line["step"]) for line in lines] == [1, 2, 3, 4]
    assert all(float(line["rows_per_second"]) > 0 and float(line["tokens_per_second"]) > 0 for line in lines)
    useful = [float(line["useful"]) for line in lines]
    assert all(share == 1 for share in useful) if packed else all(0.5 < share <= 1 for share in useful)
    with PIL.Image.open(tmp_path / "progress.png") as picture:
        assert picture.size == (800, 600)


def test_resumed_run_goes_on_in_the_same_file(workspace, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    recipe = write_recipe(workspace, trainer=TRAINER | saving, output_dir=str(tmp_path))
    train(read_recipe(recipe))
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    train(read_recipe(recipe), resume=True)
    assert [int(line["step"]) for line in read_lines(tmp_path)] == [1, 2, 3, 4]


def test_loss_that_is_no_number_stops_the_run(workspace, tmp_path):
    model = AutoModelForVision2Seq.from_pretrained(workspace / "start")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    (tmp_path / "broken").mkdir()
    for path in (workspace / "start").iterdir():
        (tmp_path / "broken" / path.name).write_bytes(path.read_bytes())
    model.save_pretrained(tmp_path / "broken")
    fields = {"model": str(tmp_path / "broken"), "output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="got a loss of nan at step 1; expected a number"):
        train(read_recipe(write_recipe(workspace, **fields)))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    check_loss(torch.tensor(1.0), step=1)
