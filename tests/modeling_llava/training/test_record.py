"""training_record.json: everything that a card later says of a run is in it."""

import hashlib
import json

import pytest
import yaml

from modeling_llava.cli import main
from modeling_llava.records.training_record import read_run_files
from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import train
from modeling_llava.training.run_log import describe_source
from processing_llava.data.data_sources import DataSource
from tests.modeling_llava.training.conftest import write_recipe

MANIFEST = [{"name": "squares", "kind": "synthetic", "made_by": "a test", "license": "mit", "rows": 12}]


def read_record(folder) -> dict:
    return json.loads((folder / "training_record.json").read_text())


def test_a_run_writes_what_it_was_made_of_and_what_came_out(workspace):
    (workspace / "manifest.yaml").write_text(yaml.safe_dump(MANIFEST))
    trainer = {"learning_rate": 3e-3, "max_steps": 2, "logging_steps": 1, "seed": 5, "disable_tqdm": True}
    path = write_recipe(workspace, stage="align", trainer=trainer, data_manifest=str(workspace / "manifest.yaml"))
    record = read_record(train(read_recipe(path)))
    assert record["recipe"]["stage"] == "align"
    assert record["base_model"] is None  # a folder, and no id of the Hub
    assert record["hyperparameters"]["learning_rate"] == 3e-3
    assert record["hyperparameters"]["seed"] == 5
    rows = workspace / "rows.json"
    assert record["data"] == [
        {
            "path": str(rows),
            "files": 1,
            "bytes": rows.stat().st_size,
            "sha256": hashlib.sha256(rows.read_bytes()).hexdigest(),
        }
    ]
    assert record["data_manifest"][0]["license"] == "mit"
    assert (record["rows"], record["steps"], record["first_step"]) == (12, 2, 0)
    trained = {part: count["trained"] for part, count in record["parameters"].items()}
    assert trained["mm_projector"] == record["parameters"]["mm_projector"]["total"]
    assert trained["language_model"] == trained["vision_tower"] == 0
    assert [line["step"] for line in record["losses"]] == [1, 2]
    assert record["seconds"] > 0
    assert record["hardware"]["device"]
    assert {"python", "torch", "transformers", "trl", "anyllava"} <= set(record["versions"])


def test_a_second_stage_holds_the_record_of_the_first(workspace):
    first = train(read_recipe(write_recipe(workspace, stage="align", output_dir=str(workspace / "first"))))
    second = train(
        read_recipe(write_recipe(workspace, model=str(first), output_dir=str(workspace / "second"), stage="finetune"))
    )
    assert read_record(second)["previous"] == read_record(first)
    stages = read_run_files(second).stages
    assert [stage["recipe"]["stage"] for stage in stages] == ["align", "finetune"]


def test_a_run_that_was_over_keeps_its_record(workspace):
    trainer = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "disable_tqdm": True}
    recipe = read_recipe(write_recipe(workspace, trainer=trainer, output_dir=str(workspace / "over")))
    record = read_record(train(recipe))
    assert read_record(train(recipe, resume=True)) == record


def test_tokens_of_the_environment_are_written_nowhere_and_pickles_are_not_exported(workspace, tmp_path, monkeypatch):
    token = "hf_" + "aB3" * 12
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, token)
    trainer = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "disable_tqdm": True}
    out = train(read_recipe(write_recipe(workspace, trainer=trainer, output_dir=str(tmp_path / "out"))))
    files = [path for path in out.rglob("*") if path.is_file()]
    assert not any(token.encode() in path.read_bytes() for path in files)
    pickles = {path.relative_to(out).parts[0] for path in files if path.suffix in (".bin", ".pt", ".pth")}
    assert pickles == {"checkpoint-1"}
    facts = ["--license", "mit", "--base-model", "someone/tower", "--repo-id", "me/pictures"]
    for folder in (out, out / "checkpoint-1"):
        exported = tmp_path / f"exported {folder.name}"
        assert main(["export", str(folder), "--out", str(exported), *facts]) == 0
        assert not any(path.suffix in (".bin", ".pt", ".pth") for path in exported.rglob("*"))
        assert not any(str(tmp_path).encode() in path.read_bytes() for path in exported.rglob("*") if path.is_file())


def test_a_wrong_manifest_stops_the_run_before_it_trains(workspace):
    (workspace / "wrong.yaml").write_text(yaml.safe_dump([{"name": "squares", "kind": "found"}]))
    fields = {"data_manifest": str(workspace / "wrong.yaml"), "output_dir": str(workspace / "never")}
    recipe = read_recipe(write_recipe(workspace, **fields))
    with pytest.raises(ValueError, match="got kind='found' for data squares; expected one of public"):
        train(recipe)


def test_a_folder_is_identified_by_all_its_data_files(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.jsonl").write_text("{}\n")
    (tmp_path / "picture.png").write_bytes(b"not rows")
    described = describe_source(DataSource(path=str(tmp_path)))
    assert (described["files"], described["sha256"]) == (2, hashlib.sha256(b"[]{}\n").hexdigest())


def test_a_dataset_of_the_hub_is_named_even_if_its_commit_is_unknown():
    assert describe_source(DataSource(path="someone/rows")) == {"path": "someone/rows", "revision": None}
