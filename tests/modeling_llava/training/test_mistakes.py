"""Mistakes in the recipe of a run that only transformers finds end in one line, too."""

import importlib.util

import pytest

from modeling_llava.cli import main
from tests.modeling_llava.training.conftest import write_recipe


def error_of(recipe, *settings: str, capsys) -> str:
    assert main(["train", str(recipe), *settings]) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "trainer.report_to=nowhere",
            "got trainer.report_to='nowhere'; expected none, or tensorboard or codecarbon, which write files here",
        ),
        ("image_aspect_ratio=anyres", "got image_aspect_ratio 'anyres' for"),
        ("trainer.report_to=[tensorboard, nowhere]", "got trainer.report_to='nowhere'"),
        (
            "trainer.report_to=codecarbon",
            "got trainer.report_to='codecarbon', which is not installed; expected it, or none: pip install codecarbon",
        ),
        ("trainer.lr_scheduler_kwargs={waves: 1}", "got trainer.lr_scheduler_kwargs={'waves': 1} (get_cosine"),
        pytest.param(
            "trainer.deepspeed=missing.json",
            "deepspeed is not installed; this command needs it: pip install deepspeed",
            marks=pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is there"),
        ),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_line(workspace, tmp_path, capsys, setting, message):
    recipe = write_recipe(workspace, output_dir=str(tmp_path / "out"))
    assert error_of(recipe, setting, capsys=capsys).startswith(f"llava: {message}")


def test_an_output_folder_that_is_a_file_is_one_line(workspace, tmp_path, capsys):
    (tmp_path / "out").touch()
    recipe = write_recipe(workspace, output_dir=str(tmp_path / "out"))
    assert str(tmp_path / "out") in error_of(recipe, capsys=capsys)
