"""What is set beside the file, and the names and types that are refused in both."""

import dataclasses
import time

import pytest
import yaml
from trl import SFTConfig

from modeling_llava.cli import main
from modeling_llava.training import trainer_fields
from modeling_llava.training.recipe import Recipe, read_recipe
from modeling_llava.training.trainer_fields import DECIDED_BY_PACKING, FREE_FIELDS, INSTEAD, TRAINER_FIELDS
from processing_llava.data.data_sources import DataSource

SENDING = (
    "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token", "project",
    "push_to_hub", "run_name", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
)  # fmt: skip
"""Fields of SFTConfig that send something somewhere while a run goes on."""
LOSING = ("chat_template_path", "eos_token", "max_length", "output_dir", "remove_unused_columns")
"""Those that would lose rows, or what the recipe says of them."""
WITHOUT_EFFECT = (
    "assistant_only_loss", "batch_eval_metrics", "completion_only_loss", "dataset_kwargs", "dataset_num_proc",
    "dataset_text_field", "do_eval", "do_predict", "do_train", "eval_packing", "include_for_metrics", "label_names",
    "length_column_name", "local_rank", "model_init_kwargs", "optim_target_modules", "packing", "packing_strategy",
    "pad_to_multiple_of", "pad_token",
    "padding_free", "resume_from_checkpoint", "shuffle_dataset", "truncation_mode", "trust_remote_code",
)  # fmt: skip
"""Those that something else decides here."""

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
            "got trainer.learning_rat, which no recipe takes; expected a field such as learning_rate",
        ),
        ("trainer.zzz=1", "got trainer.zzz, which no recipe takes; expected a field such as learning_rate$"),
        ("output_dir=./some/model", "where the model to train lies"),
        ("projector_learning_rate=-1e-4", "expected 0 or more"),
        ("lora.init_lora_weights=eva", "begin with random numbers"),
        ("trainer.train_sampling_strategy=group_by_length", "expected 'random' or 'sequential'"),
        ("trainer.output_dir=a", "got trainer.output_dir, which no recipe takes; expected output_dir at the top"),
        (
            "trainer.max_length=100",
            "got trainer.max_length, .*; expected max_length at the top of the recipe, which cuts no",
        ),
        ("trainer.learning_rate=fast", "got learning_rate='fast' in trainer of .*; expected float"),
        ("trainer.max_steps=1.5", "got max_steps=1.5 in trainer of .*; expected int"),
        ("trainer.max_steps=true", "got max_steps=True in trainer"),
        ("lora.rank=8", "got rank in lora of .*; expected fields of LoraConfig"),
        ("lora.r=many", "got r='many' in lora"),
        ("lora.init_lora_weights=pissa_niter_16", "got lora.init_lora_weights='pissa_niter_16'.*; expected 'pissa'"),
        ("trainer.chat_template_path=a.jinja", "got trainer.chat_template_path, .*; expected template at the top"),
        ("trainer.eos_token=<pad>", "got trainer.eos_token, .*; expected template at the top"),
        ("trainer.remove_unused_columns=true", "got trainer.remove_unused_columns, which no recipe takes"),
        (
            "trainer.gradient_accumulation_steps=0",
            "got trainer.gradient_accumulation_steps=0; expected at least 1 and at most",
        ),
        ("data.0.file=a", "got file in data of .*; expected fields of DataSource, such as path"),
        ("data.0.weight=much", "got weight='much' in data"),
        ("data=3", "got data=3 in"),
        ("trainer=3", "got 3 as trainer of .*; expected a mapping"),
        ("tokens_per_batch=0", "got tokens_per_batch=0; expected at least 1"),
        ("bad_rows=ignore", "got bad_rows='ignore'; expected one of raise, skip"),
        ("trainer.assistant_only_loss=false", "got trainer.assistant_only_loss, which no recipe takes; expected a"),
        ("trainer.resume_from_checkpoint=a", "got trainer.resume_from_checkpoint, .* `llava train --resume`"),
        ("trainer.push_to_hub=true", "got trainer.push_to_hub, which no recipe takes; expected `llava push` after"),
        ("trainer.packing=true", "got trainer.packing, which no recipe takes; expected tokens_per_batch at the top"),
        ("data.0.streaming=true", "got streaming data, whose rows are not counted; .*: set max_steps under trainer"),
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
        ({"trainer": {"learning_rat": 1}}, "got trainer.learning_rat, which no recipe takes"),
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


def test_streaming_rows_are_not_packed(tmp_path):
    settings = ("data.0.streaming=true", "tokens_per_batch=100")
    with pytest.raises(ValueError, match="got tokens_per_batch for data that is streaming; expected data on disk"):
        read(tmp_path, *settings, trainer={"max_steps": 3})


def test_every_setting_of_trl_was_decided_on():
    """One that a newer TRL adds may lose rows, or send them somewhere: it belongs into one of these."""
    known = [item.name for item in dataclasses.fields(SFTConfig)]
    decided = [*TRAINER_FIELDS, *LOSING, *WITHOUT_EFFECT, *SENDING]
    assert len(set(decided)) == len(decided)
    assert set(known) <= set(decided)
    assert INSTEAD.keys() <= {*LOSING, *WITHOUT_EFFECT, *SENDING} & set(known)
    assert set(DECIDED_BY_PACKING) <= set(TRAINER_FIELDS) & set(known)
    assert set(FREE_FIELDS) <= set(TRAINER_FIELDS)
    sending = ("hub", "trackio", "wandb", "token", "project", "run_name", "url", "upload")
    suspicious = {name for name in known if any(word in name for word in sending)}
    harmless = {"include_num_input_tokens_seen", "average_tokens_across_devices", "eos_token", "pad_token"}
    assert suspicious - harmless == set(SENDING) & set(known)


@pytest.mark.parametrize("name", LOSING + WITHOUT_EFFECT)
def test_what_loses_rows_or_has_no_effect_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"got trainer.{name}, which no recipe takes; expected .+"):
        read(tmp_path, f"trainer.{name}=true")


def test_a_setting_that_nobody_decided_on_is_refused(tmp_path, monkeypatch):
    fields = tuple(name for name in TRAINER_FIELDS if name != "learning_rate")
    monkeypatch.setattr(trainer_fields, "TRAINER_FIELDS", fields)
    with pytest.raises(ValueError, match="got trainer.learning_rate, which no recipe takes; expected a field such as"):
        read(tmp_path, "trainer.learning_rate=1e-4")


TOKEN = "hf_" + "aB3" * 12


@pytest.mark.parametrize("name", SENDING)
@pytest.mark.parametrize("value", [TOKEN, "true", "7", "null"])
def test_what_sends_is_refused_without_its_value(tmp_path, capsys, name, value):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(FIELDS))
    assert main(["train", str(tmp_path / "recipe.yaml"), f"trainer.{name}={value}", "--preview"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"llava: got trainer.{name}, which no recipe takes; expected ")
    assert TOKEN not in message and message.count("\n") == 1
    with pytest.raises(ValueError, match=f"got (trainer.{name}, which no recipe takes|an access token in recipe)"):
        Recipe(stage="lora", model="m", data=[DataSource(path="d")], output_dir="o", trainer={name: value})


@pytest.mark.parametrize(
    "setting",
    [
        f"trainer.optim_args={TOKEN}",
        f"trainer.lr_scheduler_kwargs.key={TOKEN}",
        f"data.0.path=https://user:{TOKEN}@a.b",
    ]
    + [f"lora.target_modules=[{TOKEN}]", f"trainer.report_to={TOKEN}", f"model={TOKEN}", f"max_length={TOKEN}"]
    + [f"trainer.deepspeed.wandb.key={TOKEN}", f"data.7.path={TOKEN}", f"trainer={TOKEN}", TOKEN],
)
def test_an_access_token_is_refused_and_not_told(tmp_path, capsys, setting):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(FIELDS))
    assert main(["train", str(tmp_path / "recipe.yaml"), setting, "--preview"]) == 2
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err and "got " in printed.err


@pytest.mark.parametrize("name", ["all", "wandb", "comet_ml", "mlflow", "trackio", "clearml", "swanlab", "azure_ml"])
def test_reports_stay_on_this_machine(tmp_path, name):
    for setting in (name, f"[{name}]", f"[tensorboard, {name}]"):
        with pytest.raises(ValueError, match=f"got trainer.report_to='{name}'; expected none, or tensorboard or cod"):
            read(tmp_path, f"trainer.report_to={setting}")
    for setting in ("none", "[none]", "[]", "null", "tensorboard", "[tensorboard, codecarbon]"):
        read(tmp_path, f"trainer.report_to={setting}")


def test_deepspeed_tells_no_tracker(tmp_path):
    (tmp_path / "deepspeed.json").write_text('{"wandb": {"enabled": true}}')
    for setting in (f"trainer.deepspeed={tmp_path / 'deepspeed.json'}", "trainer.deepspeed.comet.enabled=true"):
        with pytest.raises(ValueError, match="got (wandb|comet) in trainer.deepspeed, which sends"):
            read(tmp_path, setting)


@pytest.mark.parametrize("name", TRAINER_FIELDS)
def test_a_number_out_of_range_is_refused_whatever_the_field(tmp_path, name):
    """Where a field takes numbers; where it takes none, its type refuses them."""
    for value in ("-2", "-0.5", "1e30", "9" * 30, ".nan", ".inf"):
        with pytest.raises(ValueError, match=rf"got (trainer\.)?{name}=.*; expected"):
            read(tmp_path, f"trainer.{name}={value}")


@pytest.mark.parametrize("best", [None, "eval_data", "eval_data, load_best_model_at_end", "eval_data, save_strategy"])
@pytest.mark.parametrize(
    "metric", [None, "loss", "eval_loss", "accuracy", "eval_accuracy", "mean_token_accuracy", "", "eval_runtime"]
)
@pytest.mark.parametrize("greater", [None, False, True])
def test_what_chooses_the_best_is_measured(tmp_path, best, metric, greater):
    """Each combination is read, or refused before the run with what can be chosen by."""
    trainer = {"metric_for_best_model": metric, "greater_is_better": greater}
    if best is not None and ", " in best:
        trainer |= {"save_strategy": "best"} if "save" in best else {"load_best_model_at_end": True}
    fields = {"trainer": {name: value for name, value in trainer.items() if value is not None}}
    if best is not None:
        fields["eval_data"] = [{"path": "rows.json"}]
    is_measured = metric is None or (metric in ("loss", "eval_loss", "mean_token_accuracy") and best is not None)
    has_effect = greater is None or metric is not None or (best is not None and ", " in best)
    if is_measured and has_effect:
        assert read(tmp_path, **fields).trainer == fields["trainer"]
        return
    expected = (
        "expected one of loss, eval_loss, " if not is_measured else "got trainer.greater_is_better, which has no"
    )
    with pytest.raises(ValueError, match=expected):
        read(tmp_path, **fields)


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


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{former}'] * 9)}]\n" for former, name in zip("abcdefgh", "bcdefghi")
)
BOMBS = {
    "aliases": ALIASES,
    "merges": ALIASES.replace("[x, x, x, x, x, x, x, x, x]", "{k: 1}").replace("[*", "{<<: [*").replace("]\n", "]}\n"),
    "a loop": "trainer: &a [*a]",
    "a long text again and again": f"a: &a {'x' * 50_000}\nb: [{', '.join(['*a'] * 9000)}]",
    "lists": "data: " + "[" * 90_000,
    "mappings": "data: " + "{a: " * 20_000,
    "items": "? " * 40_000,
    "a number": "max_length: " + "9" * 90_000,
    "minutes": "max_length: 1" + ":1" * 40_000 + ".5",
    "a name": "a" * 90_000 + ": 1",
    "a value": f"stage: {'x' * 90_000}",
    "a list as a value": f"stage: [{', '.join(['x'] * 9_000)}]",
    "a long file": "# " + "x" * 10_000_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_recipe_that_is_a_bomb_is_one_short_line(tmp_path, capsys, name):
    (tmp_path / "recipe.yaml").write_text(BOMBS[name])
    start = time.process_time()
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 2
    assert time.process_time() - start < 2
    assert len(capsys.readouterr().err) < 2000
    if name != "a long file":
        with pytest.raises(ValueError, match="^got "):
            read(tmp_path, f"trainer.optim_args={BOMBS[name]}")
