"""`llava train --preview`: what it says is what the run does, and it leaves nothing behind."""

import re
from pathlib import Path

import pytest
import yaml

from modeling_llava.acceleration.devices import format_bytes
from modeling_llava.cli import main
from modeling_llava.training import run_preview
from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import trainer_settings
from tests.modeling_llava.training.conftest import write_recipe

TRAINER = {"learning_rate": 1e-3, "per_device_train_batch_size": 2, "disable_tqdm": True}


def preview(capsys, recipe: Path, *settings: str) -> list[str]:
    """The sections that are printed."""
    assert main(["train", str(recipe), "--preview", *settings]) == 0
    return [section for section in re.split(r"\n\n+", capsys.readouterr().out.strip()) if section]


@pytest.mark.parametrize("fields", [{}, {"stage": "lora", "lora": {"r": 4}}, {"tokens_per_batch": 400}], ids=str)
def test_recipe_that_is_printed_is_the_recipe(workspace, tmp_path, capsys, fields):
    trainer = {} if "tokens_per_batch" in fields else {"per_device_train_batch_size": 2}
    trainer |= {"learning_rate": 1e-3, "disable_tqdm": True}
    path = write_recipe(workspace, **fields, trainer=trainer, output_dir=str(tmp_path / "out"))
    printed, *_ = preview(capsys, path, "projector_learning_rate=2e-3")
    (tmp_path / "printed.yaml").write_text(printed)
    expected = read_recipe(path, ["projector_learning_rate=2e-3"])
    found = read_recipe(tmp_path / "printed.yaml")
    assert trainer_settings(found) == trainer_settings(expected)
    if expected.uses_lora:
        assert found.lora == {"r": 4, "lora_alpha": 256, "lora_dropout": 0.05, "bias": "none"}
    assert vars(found) | {"trainer": {}, "lora": {}} == vars(expected) | {"trainer": {}, "lora": {}}
    names = yaml.safe_load(printed).keys()
    assert {"template", "too_long", "compile_blocks"} <= names


def test_parameters_memory_and_batch(workspace, tmp_path, capsys):
    fields = {"train_vision_tower": True, "vision_tower_learning_rate": 3e-5, "projector_learning_rate": 2e-3}
    path = write_recipe(workspace, **fields, trainer=TRAINER, output_dir=str(tmp_path / "out"))
    _, parameters, memory, *rows = preview(capsys, path)
    table = [line.split() for line in parameters.splitlines()[1:]]
    assert table == [
        ["vision_tower", "18,624", "18,624", "3e-05"],
        ["mm_projector", "1,856", "1,856", "0.002"],
        ["language_model", "27,168", "27,168", "0.001"],
        ["lm_head", "9,600", "9,600", "0.001"],
    ]
    lines = memory.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["weights", "gradients", "optimizer", "activations", "sum"]
    assert re.fullmatch(r"[\d.]+ GiB free on cpu; gradient checkpointing is off", lines[6])
    assert len(rows) == 2
    assert "[image 40x30: 16 tokens]" in rows[0] and "ASSISTANT:<< Red.</s>>>" in rows[0]


def test_a_sharded_model_is_shown_whole_and_not_computed_with(workspace, tmp_path, capsys, monkeypatch):
    """18,624 frozen and 38,624 trained elements in float32: AdamW holds two more of each that trains."""
    monkeypatch.setattr(run_preview, "is_sharded", lambda arguments: True)
    monkeypatch.delattr(run_preview, "estimate_step")
    trainer = TRAINER | {"gradient_checkpointing": False}
    path = write_recipe(workspace, trainer=trainer, output_dir=str(tmp_path / "out"))
    memory = preview(capsys, path)[2].splitlines()
    sizes = {"weights": 57_248, "gradients": 38_624, "optimizer": 2 * 38_624, "sum": 57_248 + 3 * 38_624}
    assert [line.split() for line in memory[1:5]] == [
        [name, *format_bytes(4 * number).split()] for name, number in sizes.items()
    ]
    assert memory[5].startswith("FSDP and ZeRO-3 shard all of it between 1 processes, ZeRO-2 gradients and optimizer")


def test_packed_batch_is_the_first_of_the_run(workspace, tmp_path, capsys):
    path = write_recipe(workspace, tokens_per_batch=400, trainer={"disable_tqdm": True}, output_dir=str(tmp_path))
    rows = preview(capsys, path)[3:]
    assert len(rows) == 2
    assert all(re.match(r"--- \d: \d+ tokens, \d+ supervised\n", row) for row in rows)


def test_nothing_is_left_behind(workspace, tmp_path, capsys):
    fields = {"output_dir": str(tmp_path / "out"), "feature_cache": str(tmp_path / "cache")}
    path = write_recipe(workspace, **fields, trainer=TRAINER)
    before = sorted(workspace.rglob("*"))
    preview(capsys, path)
    assert not list(tmp_path.iterdir())
    assert sorted(workspace.rglob("*")) == before


def test_settings_come_before_and_after_options(workspace, tmp_path, capsys):
    path = write_recipe(workspace, trainer=TRAINER)
    arguments = [str(path), "stage=align", "--preview", f"output_dir={tmp_path}", "trainer.learning_rate=1e-2"]
    assert main(["train", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "stage: align" in printed and "learning_rate: 0.01" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trainer.learning_rat=1"],
            "got trainer.learning_rat, which no recipe takes; expected a field such as learning_rate",
        ),
        (["--preview", "max_length"], "got 'max_length'; expected KEY=VALUE"),
        (["data.0.path=missing.json"], "missing.json"),
        (["--preview", "model=missing/model"], "got model 'missing/model'; expected a folder or a Hub id"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(workspace, tmp_path, capsys, arguments, message):
    path = write_recipe(workspace, trainer=TRAINER, output_dir=str(tmp_path / "out"))
    assert main(["train", str(path), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("llava: ") and message in error


def test_options_that_are_unknown_are_no_settings(workspace, capsys):
    with pytest.raises(SystemExit):
        main(["train", str(write_recipe(workspace)), "--previw"])
    assert "unrecognized arguments: --previw" in capsys.readouterr().err
