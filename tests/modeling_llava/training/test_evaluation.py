"""`eval_data` of a recipe: the loss of rows that are not trained on."""

import json

import pytest
import torch

from modeling_llava import AutoModelForVision2Seq
from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import build_trainer, train
from tests.modeling_llava.training.conftest import write_recipe
from tests.modeling_llava.training.test_run_log import read_lines

TRAINER = {"learning_rate": 3e-3, "logging_steps": 1, "num_train_epochs": 2, "disable_tqdm": True}


@pytest.fixture(scope="module")
def eval_data(workspace) -> list[dict[str, str]]:
    """Five rows of other lengths and answers than those that are trained on, two of them without a picture."""
    rows = []
    for number, (color, answer) in enumerate([("red", "It is red."), ("blue", "Blue"), ("white", "A white one.")]):
        conversations = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"e{number}", "image": f"{color}.png", "conversations": conversations})
    for number in range(2):
        conversations = [{"from": "human", "value": "Hi " * (number + 1)}, {"from": "gpt", "value": "Hello you."}]
        rows.append({"id": f"t{number}", "conversations": conversations})
    (workspace / "eval.json").write_text(json.dumps(rows))
    return [{"path": str(workspace / "eval.json"), "image_folder": str(workspace)}]


@pytest.mark.parametrize("settings", [{"tokens_per_batch": 300}, {}], ids=["packed", "padded"])
def test_the_loss_is_that_of_each_row_alone(workspace, tmp_path, eval_data, settings):
    trainer = TRAINER | {"per_device_eval_batch_size": 1} | ({} if settings else {"per_device_train_batch_size": 4})
    recipe = read_recipe(
        write_recipe(workspace, **settings, trainer=trainer, eval_data=eval_data, output_dir=str(tmp_path))
    )
    trained = build_trainer(recipe)
    trained.train()
    logged = [log["eval_loss"] for log in trained.state.log_history if "eval_loss" in log]
    assert len(logged) == 2

    model = trained.model.eval()
    losses = []
    for row in trained.eval_dataset:
        batch = trained.data_collator([row])
        with torch.no_grad():
            losses.append(model(**batch).loss.item())
    assert len(losses) == 5
    assert logged[-1] == pytest.approx(sum(losses) / 5, abs=1e-5)


def test_training_is_what_it_is_without(workspace, tmp_path, eval_data):
    trainer = TRAINER | {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3}
    weights = []
    for name, extra in {"without": {}, "with": {"eval_data": eval_data}}.items():
        out = train(read_recipe(write_recipe(workspace, **extra, trainer=trainer, output_dir=str(tmp_path / name))))
        weights.append(AutoModelForVision2Seq.from_pretrained(out).state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

    lines = read_lines(tmp_path / "with")
    evaluated = [(line["step"], float(line["eval_loss"])) for line in lines if line["eval_loss"]]
    assert [step for step, _ in evaluated] == ["3", "6"]
    record = json.loads((tmp_path / "with" / "training_record.json").read_text())
    assert [(str(loss["step"]), loss["loss"]) for loss in record["eval_losses"]] == evaluated
    assert record["eval_data"][0]["files"] == 1
    # Time to evaluate is not time to train.
    assert all(float(line["rows_per_second"]) > 0 for line in lines if line["loss"])

    (tmp_path / "with" / "checkpoint-6" / "trainer_state.json").unlink()
    recipe = write_recipe(workspace, eval_data=eval_data, trainer=trainer, output_dir=str(tmp_path / "with"))
    train(read_recipe(recipe), resume=True)
    resumed = read_lines(tmp_path / "with")
    assert [line["eval_loss"] for line in resumed] == [line["eval_loss"] for line in lines]
    record = json.loads((tmp_path / "with" / "training_record.json").read_text())
    assert [(str(loss["step"]), loss["loss"]) for loss in record["eval_losses"]] == evaluated


@pytest.mark.parametrize("stage", ["finetune", "lora"])
def test_the_best_checkpoint_can_be_kept(workspace, tmp_path, eval_data, stage):
    """Here the best is the one with the highest loss, which is not the last."""
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = {"learning_rate": 3e-3, "max_steps": 4, "per_device_train_batch_size": 4, "disable_tqdm": True}
    trainer |= saving | {"load_best_model_at_end": True, "greater_is_better": True}
    recipe = write_recipe(workspace, stage=stage, eval_data=eval_data, trainer=trainer, output_dir=str(tmp_path))
    out = train(read_recipe(recipe))
    record = json.loads((out / "training_record.json").read_text())
    best = max(record["eval_losses"], key=lambda loss: loss["loss"])
    assert best["step"] < 4
    kept, checkpoint = (
        AutoModelForVision2Seq.from_pretrained(folder).state_dict()
        for folder in (out, out / f"checkpoint-{best['step']}")
    )
    assert all(torch.equal(value, checkpoint[name]) for name, value in kept.items())


def test_a_cache_of_features_serves_them(workspace, tmp_path, eval_data):
    trainer = TRAINER | {"per_device_train_batch_size": 4}
    losses = []
    for name, extra in {"plain": {}, "cached": {"feature_cache": str(tmp_path / "features")}}.items():
        recipe = write_recipe(
            workspace, **extra, eval_data=eval_data, trainer=trainer, output_dir=str(tmp_path / name)
        )
        record = json.loads((train(read_recipe(recipe)) / "training_record.json").read_text())
        losses.append([loss["loss"] for loss in record["eval_losses"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        (["trainer.eval_strategy=steps"], "eval_strategy='steps' and 0 sources"),
        (["eval_data=[{path: rows.json, streaming: true}]"], "streaming or has a weight"),
        (["eval_data=[{path: rows.json, weight: 2}]"], "streaming or has a weight"),
        (["eval_data=[{path: rows.json}]", "trainer.eval_strategy=no"], "eval_strategy='no' and 1 sources"),
        (["eval_data=[{path: rows.json, pathh: a}]"], "pathh in eval_data"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(workspace, settings, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(write_recipe(workspace), settings)


def shared_lines(workspace, tmp_path, caplog, data, eval_data, **fields) -> list[str]:
    places = {"path": str(tmp_path / "numbered.json"), "image_folder": str(workspace)}
    fields |= {"data": [places | data], "eval_data": [places | eval_data], "output_dir": str(tmp_path / "out")}
    caplog.clear()
    build_trainer(read_recipe(write_recipe(workspace, **fields)))
    return [message for message in caplog.messages if "eval_data" in message]


@pytest.mark.parametrize("has_ids", [False, True])
@pytest.mark.parametrize(
    ("data", "eval_data", "number"),
    [
        ({"split": "train[:75%]"}, {"split": "train[75%:]"}, 0),
        ({"split": "train[:75%]"}, {"split": "train[50%:]"}, 2),
        ({}, {}, 8),
        ({}, {"path": "copy.jsonl"}, 8),
        ({"split": "train[:1]"}, {"path": "copy.jsonl"}, 1),
    ],
)
def test_rows_that_are_evaluated_and_trained_on_are_counted(
    workspace, tmp_path, caplog, data, eval_data, number, has_ids
):
    rows = json.loads((workspace / "rows.json").read_text())
    rows = [rows[index % 3] | {"id": f"r{index}"} for index in range(8)]
    for index, row in enumerate(rows):
        question, answer = row["conversations"]
        row["conversations"] = [question, answer | {"value": f"{answer['value']} {index}"}]
        if not has_ids:
            del row["id"]
    (tmp_path / "numbered.json").write_text(json.dumps(rows))
    (tmp_path / "copy.jsonl").write_text("\n".join(map(json.dumps, reversed(rows))))
    if "path" in eval_data:
        eval_data = {"path": str(tmp_path / "copy.jsonl")}
    for fields in ({"tokens_per_batch": 300, "trainer": {}}, {"max_length": 500}):
        lines = shared_lines(workspace, tmp_path, caplog, data, eval_data, **fields)
        assert [line.split(" of ")[0] for line in lines if "trained on too" in line] == [str(number)] * bool(number)
    lines = shared_lines(workspace, tmp_path, caplog, {"streaming": True}, eval_data)
    assert lines == ["rows of eval_data were not looked for among streaming data: keep them apart"]
