"""What a run cannot change when it is resumed, and what it can."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from peft import EvaConfig
from trl import SFTConfig

from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import train, trainer_settings
from modeling_llava.training.run_folder import SETTINGS_FILE, check_settings, describe_settings
from tests.modeling_llava.training.conftest import write_recipe

PACKED = {"stage": "lora", "tokens_per_batch": 600, "trainer": {"max_steps": 9}}
CONSTANT = {"trainer": {"max_steps": 9, "lr_scheduler_type": "constant"}}


def describe(folder: Path, fields: dict, *changes: str, num_rows: int = 5) -> dict:
    recipe = read_recipe(write_recipe(folder, **{"model": "m", "output_dir": str(folder)} | fields), changes)
    rows = {
        "id": [f"row {index}" for index in range(num_rows)],
        "num_tokens": [9] * num_rows,
        "num_images": [1] * num_rows,
    }
    arguments = SFTConfig(output_dir=str(folder), **trainer_settings(recipe))
    return describe_settings(recipe, arguments, Dataset.from_dict(rows))


def write_settings(folder: Path, settings: dict) -> None:
    (folder / SETTINGS_FILE).write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("fields", "change", "message"),
    [
        (PACKED, "trainer.seed=7", "trainer.seed: 7 instead of 42"),
        (PACKED, "trainer.learning_rate=1e-5", "trainer.learning_rate: 1e-05 instead of 2e-05"),
        (PACKED, "projector_learning_rate=1e-5", "projector_learning_rate: 1e-05 instead of None"),
        (PACKED, "tokens_per_batch=700", "tokens_per_batch: 700 instead of 600"),
        (PACKED, "trainer.gradient_accumulation_steps=2", "gradient_accumulation_steps: 2 instead of 1"),
        (PACKED, "lora.r=8", "lora.r: 8 instead of 128"),
        (PACKED, "lora.use_rslora=true", "lora.use_rslora: True instead of None"),
        (PACKED, "max_length=100", "max_length: 100 instead of None"),
        (PACKED, "trainer.max_steps=10", "trainer.max_steps: 10 instead of 9"),
        (PACKED, "stage=finetune", "stage: 'finetune' instead of 'lora'.*lora.r: None instead of 128"),
        (CONSTANT, "trainer.per_device_train_batch_size=2", "per_device_train_batch_size: 2 instead of 8"),
        (CONSTANT, "trainer.lr_scheduler_type=linear", "lr_scheduler_type: 'linear' instead of 'constant'"),
    ],
)
def test_settings_that_differ_are_named_with_both_values(tmp_path, fields, change, message):
    write_settings(tmp_path, describe(tmp_path, fields))
    with pytest.raises(ValueError, match=rf"{message}.*resume with the former ones, or start again"):
        check_settings(tmp_path, describe(tmp_path, fields, change))


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        (
            PACKED,
            ["trainer.save_steps=3", "trainer.dataloader_num_workers=2", "output_dtype=float16", "data.0.path=b"],
        ),
        (CONSTANT, ["trainer.max_steps=99"]),
        (CONSTANT, ["trainer.max_steps=", "trainer.num_train_epochs=3"]),
    ],
)
def test_other_settings_may_change(tmp_path, fields, changes):
    write_settings(tmp_path, describe(tmp_path, fields))
    check_settings(tmp_path, describe(tmp_path, fields, *changes))


def test_what_only_one_version_knows_is_not_compared(tmp_path):
    settings = describe(tmp_path, PACKED)
    check_settings(tmp_path, settings)
    write_settings(tmp_path, settings | {"trainer.new": 3})
    check_settings(tmp_path, settings)
    settings.pop("trainer.seed")
    write_settings(tmp_path, settings)
    check_settings(tmp_path, describe(tmp_path, PACKED))


def test_fields_of_peft_are_compared_whatever_they_hold(tmp_path):
    recipe = read_recipe(write_recipe(tmp_path, **PACKED, output_dir=str(tmp_path)))
    recipe.lora = {"target_modules": {"q_proj", "k_proj"}, "eva_config": EvaConfig()}
    arguments = SFTConfig(output_dir=str(tmp_path), **trainer_settings(recipe))
    settings = describe_settings(recipe, arguments, IterableDataset.from_generator(list))
    assert settings["lora.target_modules"] == ["k_proj", "q_proj"]
    write_settings(tmp_path, settings)
    check_settings(tmp_path, settings)


def test_rows_that_are_others_are_refused(tmp_path):
    write_settings(tmp_path, describe(tmp_path, CONSTANT))
    with pytest.raises(ValueError, match="rows: '4 with digest .*' instead of '5 with digest"):
        check_settings(tmp_path, describe(tmp_path, CONSTANT, num_rows=4))


def test_a_run_goes_on_with_its_picture_back_and_not_without_its_record(workspace, tmp_path):
    pictures = shutil.copytree(workspace, tmp_path / "rows", ignore=shutil.ignore_patterns("start", "out*"))
    records = json.loads((pictures / "rows.json").read_text())
    trainer = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "disable_tqdm": True}
    fields = {"trainer": trainer | {"per_device_train_batch_size": 1, "gradient_checkpointing": False}}
    fields |= {"data": [{"path": str(pictures / "rows.json"), "image_folder": str(pictures)}]}
    recipe = read_recipe(write_recipe(workspace, **fields, output_dir=str(tmp_path / "out")))
    (pictures / "blue.png").rename(tmp_path / "blue.png")
    with pytest.raises(ValueError, match="blue.png.* in record '1'"):
        train(recipe)
    assert (tmp_path / "out" / "checkpoint-1" / SETTINGS_FILE).is_file()

    (pictures / "rows.json").write_text(json.dumps(records[:1] + records[2:]))
    with pytest.raises(ValueError, match="rows: '11 with digest .*' instead of '12 with digest"):
        train(recipe, resume=True)
    (pictures / "rows.json").write_text(json.dumps(records))
    (tmp_path / "blue.png").rename(pictures / "blue.png")
    train(recipe, resume=True)
