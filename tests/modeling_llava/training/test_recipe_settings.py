"""What is set beside the file, and the names and types that are refused in both."""

import dataclasses

import pytest
import yaml
from trl import SFTConfig

from modeling_llava.training.recipe import Recipe, read_recipe
from modeling_llava.training.trainer_fields import NO_EFFECT, NO_EFFECT_PACKED

FIELDS = {
    "stage": "lora",
    "model": "some/model",
    "data": [{"path": "a.json", "weight": 1}, {"path": "b.json", "weight": 2}],
    "output_dir": "out",
    "trainer": {"per_device_train_batch_size": 4},
}


def read(tmp_path, *settings: str, **fields) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(FIELDS | fields))
    return read_recipe(path, settings)


def test_settings_are_stronger_than_the_file(tmp_path):
    recipe = read(
        tmp_path,
        "stage=qlora",
        "trainer.learning_rate=1e-4",
        "trainer.per_device_train_batch_size=8",
        "trainer.lr_scheduler_kwargs.num_cycles=0.5",
        "lora.r=8",
        "lora.target_modules=[a, b]",
        "lora.init_lora_weights=pissa",
        "data.1.path=c.json",
        "train_vision_tower=true",
        "max_length=null",
        "output_dir=a=b",
    )
    assert recipe.stage == "qlora"
    assert recipe.trainer == {
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-4,
        "lr_scheduler_kwargs": {"num_cycles": 0.5},
    }
    assert recipe.lora == {"r": 8, "target_modules": ["a", "b"], "init_lora_weights": "pissa"}
    assert [(source.path, source.weight) for source in recipe.data] == [("a.json", 1), ("c.json", 2)]
    assert (recipe.train_vision_tower, recipe.max_length, recipe.output_dir) == (True, None, "a=b")


def test_a_setting_without_a_value_takes_the_key_out(tmp_path):
    recipe = read(tmp_path, "trainer.per_device_train_batch_size=", "tokens_per_batch=4096", "data.0=")
    assert (recipe.trainer, recipe.tokens_per_batch) == ({}, 4096)
    assert [source.path for source in recipe.data] == ["b.json"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("learning_rate=1e-4", "got learning_rate in .*recipe.yaml; expected fields of Recipe, such as stage, model"),
        (
            "trainer.learning_rat=1",
            "got learning_rat in trainer of .*; expected fields of SFTConfig, such as learning_ra",
        ),
        ("trainer.zzz=1", "got zzz in trainer of .*; expected fields of SFTConfig$"),
        ("output_dir=./some/model", "where the model to train lies"),
        ("projector_learning_rate=-1e-4", "expected 0 or more"),
        ("lora.init_lora_weights=eva", "begin with random numbers"),
        ("trainer.train_sampling_strategy=group_by_length", "expected 'random' or 'sequential'"),
        ("trainer.output_dir=a", "got trainer.output_dir; expected output_dir at the top"),
        ("trainer.max_length=100", "got trainer.max_length, which cuts; expected max_length at the top"),
        ("trainer.learning_rate=fast", "got learning_rate='fast' in trainer of .*; expected float"),
        ("trainer.max_steps=1.5", "got max_steps=1.5 in trainer of .*; expected int"),
        ("trainer.max_steps=true", "got max_steps=True in trainer"),
        ("lora.rank=8", "got rank in lora of .*; expected fields of LoraConfig"),
        ("lora.r=many", "got r='many' in lora"),
        ("lora.init_lora_weights=pissa_niter_16", "got lora.init_lora_weights='pissa_niter_16'.*; expected 'pissa'"),
        ("trainer.chat_template_path=a.jinja", "got trainer.chat_template_path, .*; expected template at the top"),
        ("trainer.eos_token=<pad>", "got trainer.eos_token, .*; expected template at the top"),
        ("trainer.remove_unused_columns=true", "got trainer.remove_unused_columns=True, .*; expected false"),
        ("trainer.gradient_accumulation_steps=0", "got trainer.gradient_accumulation_steps=0; expected at least 1"),
        ("data.0.file=a", "got file in data of .*; expected fields of DataSource, such as path"),
        ("data.0.weight=much", "got weight='much' in data"),
        ("data=3", "got data=3 in"),
        ("trainer=3", "got 3 as trainer of .*; expected a mapping"),
        ("tokens_per_batch=0", "got tokens_per_batch=0; expected at least 1"),
        ("bad_rows=ignore", "got bad_rows='ignore'; expected one of raise, skip"),
        ("trainer.assistant_only_loss=false", "got trainer.assistant_only_loss, which has no effect here; expected n"),
        ("trainer.resume_from_checkpoint=a", "got trainer.resume_from_checkpoint, .* `llava train --resume`"),
        ("tokens_per_batch=many", "got tokens_per_batch='many' in .*; expected int"),
        ("data.2.path=c", "got 'data.2.path=c'; expected a key"),
        ("data.first.path=c", "got 'data.first.path=c'; expected a key"),
        ("stage.lora=c", "got 'stage.lora=c'; expected a key"),
        ("max_length=", "got 'max_length='; expected a key"),
        ("trainer.max_steps=[1", r"got 'trainer.max_steps=\[1'; expected a key .* and a value in YAML"),
        ("max_length", "got 'max_length'; expected KEY=VALUE"),
        ("=3", "got '=3'; expected KEY=VALUE"),
    ],
)
def test_mistakes_are_named(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, setting)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainer": {"learning_rat": 1}}, "got learning_rat in trainer of"),
        ({"lora": {"rank": 1}}, "got rank in lora of"),
        ({"data": ["a.json"]}, "got 'a.json' as data of .*; expected a mapping"),
        ({"trainer": {"log_level": "loud"}}, "got log_level='loud' in trainer of .*; expected one of .*, info"),
        ({"trainer": {"num_train_epochs": 0}}, "got trainer.num_train_epochs=0 and no max_steps"),
        ({"trainer": {"load_best_model_at_end": True}}, "expected eval_data"),
        ({"max_length": "long"}, "got max_length='long' in"),
    ],
)
def test_a_file_is_checked_like_settings(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **fields)


def test_what_packing_decides_is_refused_beside_it(tmp_path):
    settings = {"train_sampling_strategy": "sequential"}
    assert read(tmp_path, trainer=settings).trainer == settings
    with pytest.raises(ValueError, match="got trainer.train_sampling_strategy, .*: tokens_per_batch decides"):
        read(tmp_path, "tokens_per_batch=100", trainer=settings)


def test_every_refused_setting_is_one_of_trl():
    known = {item.name for item in dataclasses.fields(SFTConfig)}
    assert NO_EFFECT.keys() | NO_EFFECT_PACKED.keys() <= known


@pytest.mark.parametrize(
    ("text", "key", "line"), [("stage: align\nmodel: a\nstage: lora", "stage", 3), ("trainer: {a: 1, a: 1}", "a", 1)]
)
def test_a_key_that_stands_twice_is_refused(tmp_path, text, key, line):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"got '{key}' twice; expected it once(.|\n)* line {line},"):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_date_is_text(tmp_path):
    assert read(tmp_path, "output_dir=2024-01-01").output_dir == "2024-01-01"


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "+.1e-3", "1.0e-4"])
def test_numbers_in_scientific_notation_are_numbers(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(FIELDS).replace("stage:", f"projector_learning_rate: {text}\nstage:")
    )
    assert read_recipe(tmp_path / "recipe.yaml").projector_learning_rate == 1e-4


def test_only_true_and_false_are_booleans(tmp_path):
    """Schedules have a "no", which YAML 1.1 takes for false."""
    recipe = read(tmp_path, "trainer.eval_strategy=no", "train_vision_tower=True", "trainer.bf16=false")
    assert (recipe.trainer["eval_strategy"], recipe.trainer["bf16"], recipe.train_vision_tower) == ("no", False, True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(FIELDS).replace("trainer:", "trainer:\n  save_strategy: no"))
    assert read_recipe(tmp_path / "recipe.yaml").trainer["save_strategy"] == "no"
    with pytest.raises(ValueError, match="got train_vision_tower='yes' in .*; expected bool"):
        read(tmp_path, "train_vision_tower=yes")
