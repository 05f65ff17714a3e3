"""The files that say what a run did, and the refusal of a loss that is no number."""

import csv
import re
import shutil
import sys

import PIL.Image
import pytest
import torch
from tqdm import tqdm
from transformers import trainer_callback

from modeling_llava import AutoModelForVision2Seq
from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import build_trainer, train
from modeling_llava.training.run_log import RATES
from modeling_llava.training.trainer import check_finite
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
    left = [float(line["seconds_left"]) for line in lines]
    assert all(seconds > 0 for seconds in left[:3]) and left[3] == 0
    useful = [float(line["useful"]) for line in lines]
    assert all(share == 1 for share in useful) if packed else all(0.5 < share <= 1 for share in useful)
    with PIL.Image.open(tmp_path / "progress.png") as picture:
        assert picture.size == (800, 600)


@pytest.mark.parametrize("settings", [{"max_steps": 1}, {"max_steps": 3}, {"max_steps": 12}], ids=str)
def test_curves_of_a_short_run_are_seen(workspace, tmp_path, settings):
    """Though the Trainer logs every tenth step alone."""
    settings = {"per_device_train_batch_size": 4, "disable_tqdm": True} | settings
    train(read_recipe(write_recipe(workspace, trainer=settings, output_dir=str(tmp_path))))
    steps = [int(line["step"]) for line in read_lines(tmp_path)]
    assert steps[-1] == settings["max_steps"]
    with PIL.Image.open(tmp_path / "progress.png") as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(2**20)}
    assert any(max(color) - min(color) > 100 for color in colors)


def test_resumed_run_goes_on_in_the_same_file(workspace, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    recipe = write_recipe(workspace, trainer=TRAINER | saving, output_dir=str(tmp_path))
    train(read_recipe(recipe))
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    train(read_recipe(recipe), resume=True)
    assert [int(line["step"]) for line in read_lines(tmp_path)] == [1, 2, 3, 4]


def test_tensorboard_gets_loss_and_throughput(workspace, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    settings = TRAINER | {"per_device_train_batch_size": 4, "report_to": "tensorboard"}
    train(read_recipe(write_recipe(workspace, trainer=settings, output_dir=str(tmp_path / "out"))))
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name in ("loss", *RATES):
        assert [scalar.step for scalar in events.Scalars(f"train/{name}")] == [1, 2, 3, 4]


def test_throughput_reaches_every_log(workspace, tmp_path):
    """W&B, trackio and the like take what is in the Trainer's logs."""
    recipe = write_recipe(workspace, trainer=TRAINER | {"per_device_train_batch_size": 4}, output_dir=str(tmp_path))
    trainer = build_trainer(read_recipe(recipe))
    trainer.train()
    *logs, summary = trainer.state.log_history
    assert len(logs) == 4 and all(set(RATES) <= log.keys() for log in logs)
    assert not set(RATES) & summary.keys()


def test_progress_line_tells_throughput_and_goes_on_after_a_resume(workspace, tmp_path, monkeypatch):
    """Time left is that of tqdm, which must not take the steps of the killed run for those of the first second."""
    bars = []

    class Recording(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

        def close(self):
            self.closed_with = (self.initial, self.n, self.total, self.postfix)
            super().close()

    monkeypatch.setattr(trainer_callback, "tqdm", Recording)
    saving = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4, "disable_tqdm": False}
    recipe = write_recipe(workspace, trainer=TRAINER | saving, output_dir=str(tmp_path))
    train(read_recipe(recipe))
    shutil.rmtree(tmp_path / "checkpoint-4")
    train(read_recipe(recipe), resume=True)
    (start, *numbers, postfix), (resumed_start, *resumed_numbers, resumed_postfix) = (bar.closed_with for bar in bars)
    assert (start, resumed_start) == (0, 3)
    assert numbers == resumed_numbers == [4, 4]
    pattern = r"[\d.]+ rows/s, [\d,]+ tokens/s, \d+% useful"
    assert re.fullmatch(pattern, postfix) and re.fullmatch(pattern, resumed_postfix)


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
    check_finite("a loss", 1.0, step=1)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_gradient_that_is_no_number_stops_the_run_before_its_step(workspace, tmp_path, max_grad_norm):
    trainer = TRAINER | {"per_device_train_batch_size": 4, "max_grad_norm": max_grad_norm}
    trainer = build_trainer(read_recipe(write_recipe(workspace, trainer=trainer, output_dir=str(tmp_path))))
    weight = trainer.model.lm_head.weight
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ValueError, match="got a gradient with a norm of nan at step 1; expected a number"):
        trainer.train()
    assert torch.equal(weight, before)


def test_the_model_is_saved_where_curves_cannot_be_drawn(workspace, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    recipe = read_recipe(write_recipe(workspace, trainer=TRAINER, output_dir=str(tmp_path)))
    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        train(recipe)
    assert AutoModelForVision2Seq.from_pretrained(tmp_path).num_parameters()
