"""Every shipped recipe parses, and those of published runs have the published numbers."""

from pathlib import Path

import pytest
from trl import SFTConfig

import modeling_llava.training
from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import trainer_settings
from processing_llava.templates import load_template

FOLDER = Path(modeling_llava.training.__file__).parent / "recipes"
DEVICES = 8

PUBLISHED = {
    # name: stage, learning rate, rows a step, epochs, template, image mode
    "llava_v15_7b_pretrain": ("align", 1e-3, 256, 1, "plain", "square"),
    "llava_v15_13b_pretrain": ("align", 1e-3, 256, 1, "plain", "square"),
    "llava_v15_7b_finetune": ("finetune", 2e-5, 128, 1, "vicuna_v1", "pad"),
    "llava_v15_13b_finetune": ("finetune", 2e-5, 128, 1, "vicuna_v1", "pad"),
    "llava_v15_7b_lora": ("lora", 2e-4, 128, 1, "vicuna_v1", "pad"),
    "llava_v15_13b_lora": ("lora", 2e-4, 128, 1, "vicuna_v1", "pad"),
    "llava_v1_13b_pretrain": ("align", 2e-3, 128, 1, "plain", "square"),
    "llava_v1_13b_finetune": ("finetune", 2e-5, 128, 1, "llava_v1", "square"),
    "llava_v1_13b_qlora": ("qlora", 2e-5, 128, 1, "llava_v1", "square"),
    "llava_med_7b_pretrain": ("align", 2e-3, 128, 1, "plain", "square"),
    "llava_med_7b_finetune": ("finetune", 2e-5, 128, 3, "llava_v1", "square"),
    # Four rows on each device are all that is published of its batch.
    "llava_v16_7b_finetune": ("finetune", 1e-5, 32, 1, "vicuna_v1", None),
}


def test_all_are_known_here():
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert names == set(PUBLISHED)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_trainer_takes_the_settings(path, tmp_path):
    recipe = read_recipe(path)
    settings = trainer_settings(recipe) | {"bf16": False}
    arguments = SFTConfig(output_dir=str(tmp_path), **settings)
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.warmup_steps == 0.03
    if recipe.template is not None:
        load_template(recipe.template)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    stage, rate, rows, epochs, template, image_mode = PUBLISHED[name]
    recipe = read_recipe(FOLDER / f"{name}.yaml")
    assert recipe.stage == stage
    assert recipe.trainer["learning_rate"] == rate
    assert recipe.trainer["per_device_train_batch_size"] * DEVICES == rows
    assert recipe.trainer["num_train_epochs"] == epochs
    assert recipe.trainer["weight_decay"] == 0
    assert recipe.trainer["bf16"] is True
    assert recipe.template == template
    assert recipe.image_aspect_ratio == image_mode
    assert recipe.max_length == (32768 if "v16" in name else 2048)


def test_published_adapters():
    for size in ("7b", "13b"):
        recipe = read_recipe(FOLDER / f"llava_v15_{size}_lora.yaml")
        assert recipe.lora == {"r": 128, "lora_alpha": 256, "lora_dropout": 0.05}
        assert recipe.projector_learning_rate == 2e-5
    assert read_recipe(FOLDER / "llava_v1_13b_qlora.yaml").lora["r"] == 64
    assert read_recipe(FOLDER / "llava_v16_7b_finetune.yaml").vision_tower_learning_rate == 2e-6
