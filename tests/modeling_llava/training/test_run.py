"""`llava train` on a small real run: what each stage changes, and that the result loads and has learned."""

import json
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from transformers import AutoProcessor
from trl import SFTConfig

from modeling_llava import AutoModelForVision2Seq
from modeling_llava.cli import main
from modeling_llava.training import packed_batches, run
from modeling_llava.training.packed_batches import plan_batches
from modeling_llava.training.recipe import Recipe, read_recipe
from modeling_llava.training.run import build_trainer, train, trainer_settings
from modeling_llava.training.run_preview import preview
from modeling_llava.training.starting_model import count_parameters, freeze_all_but, load_processor, part_of
from modeling_llava.training.trainer import LlavaTrainer
from processing_llava import AnyLlavaImageProcessor, AnyLlavaImageProcessorPil
from processing_llava.data import row_lengths
from processing_llava.data.collator import LlavaDataCollator
from processing_llava.data.data_sources import DataSource
from processing_llava.data.row_datasets import load_rows
from processing_llava.data.row_lengths import measure_row
from tests.modeling_llava.training.conftest import COLORS, write_recipe
from tests.tiny import tiny_model


def changed_parts(folder: Path, out: Path) -> set[str]:
    before, after = (AutoModelForVision2Seq.from_pretrained(path).state_dict() for path in (folder / "start", out))
    return {part_of(name) for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"stage": "align"}, {"mm_projector"}),
        ({"stage": "align", "train_vision_tower": True}, {"mm_projector", "vision_tower"}),
        ({"stage": "finetune"}, {"mm_projector", "language_model", "lm_head"}),
        (
            {"stage": "finetune", "train_vision_tower": True, "vision_tower_learning_rate": 1e-3},
            {"mm_projector", "language_model", "lm_head", "vision_tower"},
        ),
    ],
)
def test_a_stage_changes_its_parts_and_no_bit_of_the_others(workspace, fields, expected):
    out = train(read_recipe(write_recipe(workspace, **fields)))
    assert changed_parts(workspace, out) == expected


def test_training_learns_what_the_pictures_show(workspace):
    trainer = {"learning_rate": 3e-3, "per_device_train_batch_size": 12, "max_steps": 60, "disable_tqdm": True}
    recipe = write_recipe(workspace, trainer=trainer, train_vision_tower=True, output_dtype="float16")
    out = train(read_recipe(recipe))
    model = AutoModelForVision2Seq.from_pretrained(out, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(out)
    for color, answer in COLORS.items():
        image = PIL.Image.open(workspace / f"{color}.png")
        content = [{"type": "image", "image": image}, {"type": "text", "text": "Color?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(generated, skip_special_tokens=True).strip() == answer


def test_each_part_has_its_learning_rate(workspace):
    recipe = Recipe(
        stage="finetune",
        model="unused",
        data=[DataSource(path="unused")],
        output_dir="out",
        train_vision_tower=True,
        projector_learning_rate=2.0,
        vision_tower_learning_rate=3.0,
    )
    model = tiny_model()
    freeze_all_but(model, recipe.trained_parts)
    trainer = object.__new__(LlavaTrainer)
    trainer.recipe = recipe
    trainer.args = type("Arguments", (), {"learning_rate": 1.0, "weight_decay": 0.5})()
    groups = trainer.group_parameters(model)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    expected = {"mm_projector": 2.0, "vision_tower": 3.0, "language_model": 1.0, "lm_head": 1.0}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == expected[part_of(name)]
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    is_weight = {name: p.ndim > 1 or name.endswith("class_embedding") for name, p in model.named_parameters()}
    assert decayed == {id(p) for name, p in model.named_parameters() if is_weight[name]}


def test_frozen_and_trained_parameters_are_counted():
    model = tiny_model()
    freeze_all_but(model, ("mm_projector",))
    counts = count_parameters(model)
    assert {part for part, (_, trained) in counts.items() if trained} == {"mm_projector"}
    assert sum(total for total, _ in counts.values()) == tiny_model().num_parameters()


@pytest.mark.parametrize(
    "text, message",
    [
        ("stage: [", "not YAML"),
        ("just text", "expected a mapping"),
        ("stage: align", "without model, data, output_dir"),
        ("stage: align\nmodel: a\noutput_dir: b\ndata: [{path: c}]\nlearning_rat: 1", "got learning_rat in"),
        ("stage: dream\nmodel: a\noutput_dir: b\ndata: [{path: c}]", "stage='dream'; expected one of align, finetune"),
        ("stage: align\nmodel: a\noutput_dir: b\ndata: []", "got no data"),
        ("stage: align\nmodel: a\noutput_dir: b\ndata: [{file: c}]", "got file in data of"),
        (
            "stage: align\nmodel: a\noutput_dir: b\ndata: [{path: c}]\nvision_tower_learning_rate: 1.0",
            "for a frozen tower",
        ),
    ],
)
def test_recipes_that_cannot_work_are_refused(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / "recipe.yaml")


def test_the_recipe_chooses_who_prepares_pictures(workspace, tmp_path):
    """And the choice is not stored, so that it cannot surprise anybody later."""
    for backend, kind in ((None, AnyLlavaImageProcessorPil), ("torch", AnyLlavaImageProcessor)):
        fields = {"image_backend": backend, "image_aspect_ratio": "square", "output_dir": str(tmp_path / str(backend))}
        trainer = build_trainer(read_recipe(write_recipe(workspace, **fields)))
        assert type(trainer.data_collator.processor.image_processor) is kind
        assert trainer.data_collator.processor.image_processor.image_aspect_ratio == "square"
        trainer.save_trained()
        loaded = AutoProcessor.from_pretrained(tmp_path / str(backend))
        assert type(loaded.image_processor) is AnyLlavaImageProcessorPil
    with pytest.raises(ValueError, match="got backend='gpu'; expected one of pil, torch"):
        load_processor(read_recipe(write_recipe(workspace, image_backend="gpu")))


@pytest.mark.parametrize("way", [{}, {"tokens_per_batch": 4000}, {"feature_cache": "cache"}], ids=str)
def test_the_recipe_chooses_which_pictures_are_too_large(workspace, tmp_path, way):
    """Wherever a run opens them."""
    pictures = shutil.copytree(workspace, tmp_path / "pictures", ignore=shutil.ignore_patterns("out*", "start"))
    PIL.Image.new("RGB", (900, 30), "red").save(pictures / "red.png")
    data = [{"path": str(pictures / "rows.json"), "image_folder": str(pictures)}]
    fields = {"data": data, "output_dir": str(tmp_path / "out"), **way}
    if "feature_cache" in way:
        fields["feature_cache"] = str(tmp_path / "cache")
    if "tokens_per_batch" in way:
        fields["trainer"] = {"max_steps": 2, "disable_tqdm": True}
    recipe = write_recipe(workspace, **fields)
    with pytest.raises(ValueError, match="max_aspect_ratio of at most 20, not 30"):
        train(read_recipe(recipe))
    allowing = read_recipe(recipe, ["image_limits.max_aspect_ratio=40"])
    assert any("[image 900x30: " in section for section in preview(allowing, color=False))
    train(allowing)


def test_a_model_with_the_processor_of_transformers_is_refused(workspace, tmp_path):
    facts = ["--license", "mit", "--base-model", "someone/vicuna"]
    assert main(["export", str(workspace / "start"), "--out", str(tmp_path / "theirs"), *facts]) == 0
    with pytest.raises(ValueError, match="with transformers' LlavaProcessor; expected one that trains:"):
        load_processor(read_recipe(write_recipe(workspace, model=str(tmp_path / "theirs"))))


def weights_after(recipe: Path) -> dict[str, torch.Tensor]:
    return AutoModelForVision2Seq.from_pretrained(train(read_recipe(recipe))).state_dict()


@pytest.mark.parametrize(
    "device, is_sharded, is_fused", [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_norms_are_fused_on_a_gpu(workspace, tmp_path, monkeypatch, device, is_sharded, is_fused):
    fused = []
    monkeypatch.setattr(run, "fuse_norms", fused.append)
    monkeypatch.setattr(run, "is_sharded", lambda arguments: is_sharded)
    # A run that believes it has a GPU goes no further than its rows.
    monkeypatch.setattr(SFTConfig, "device", torch.device(device))
    monkeypatch.setattr(packed_batches, "load_rows", lambda *args, **settings: ([], {}))
    with pytest.raises(ValueError, match="got no row in data"):
        build_trainer(read_recipe(write_recipe(workspace, output_dir=str(tmp_path / "out"))))
    assert len(fused) == is_fused


def test_packed_training_is_padded_training(workspace):
    """With all rows in one batch the order does not matter, and both must take the same steps."""
    settings = {"learning_rate": 3e-3, "num_train_epochs": 3, "disable_tqdm": True}
    padded = write_recipe(workspace, trainer=settings | {"per_device_train_batch_size": 12})
    expected = weights_after(padded)
    packed = write_recipe(workspace, trainer=settings, tokens_per_batch=4096)
    found = weights_after(packed)
    before = AutoModelForVision2Seq.from_pretrained(workspace / "start").state_dict()
    assert not torch.equal(expected["lm_head.weight"], before["lm_head.weight"])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_epochs_that_max_steps_makes_have_equally_many_batches(workspace, tmp_path):
    """An epoch with more batches than the first one would lose rows: the Trainer takes the first number for all."""
    records = json.loads((workspace / "rows.json").read_text())
    for index in range(len(records)):
        answer = {"from": "gpt", "value": "Red. " * (1 + index * 7 % 11 * 8)}
        records[index] = {"id": f"row {index}", "conversations": [{"from": "human", "value": "Color?"}, answer]}
    (tmp_path / "rows.json").write_text(json.dumps(records))
    trainer = {"max_steps": 60, "disable_tqdm": True}
    data = [{"path": str(tmp_path / "rows.json")}]
    recipe = read_recipe(write_recipe(workspace, trainer=trainer, tokens_per_batch=1110, data=data))
    arguments = SFTConfig(output_dir=str(tmp_path), **trainer_settings(recipe))
    rows, _ = load_rows(recipe.data, processor=load_processor(recipe))
    sampler = plan_batches(rows, recipe, arguments)
    for epoch in range(60 // len(sampler) + 1):
        sampler.set_epoch(epoch)
        planned = list(sampler)
        assert len(planned) == len(sampler)
        assert sorted(row for batch in planned for row in batch) == list(range(len(records)))


def test_packed_batches_hold_every_row_once_in_each_epoch(workspace, monkeypatch):
    seen = []

    class Recording(LlavaDataCollator):
        def __call__(self, rows):
            seen.append([row["id"] for row in rows])
            return super().__call__(rows)

    monkeypatch.setattr(run, "LlavaDataCollator", Recording)
    records = json.loads((workspace / "rows.json").read_text())
    records = [record | {"id": f"row {index}"} for index, record in enumerate(records)]
    (workspace / "named.json").write_text(json.dumps(records))
    data = [{"path": str(workspace / "named.json"), "image_folder": str(workspace)}]
    # Otherwise a row is measured first, to decide.
    settings = {"learning_rate": 1e-3, "num_train_epochs": 2, "disable_tqdm": True, "gradient_checkpointing": False}
    train(read_recipe(write_recipe(workspace, trainer=settings, tokens_per_batch=260, images_per_batch=3, data=data)))
    assert all(len(batch) <= 3 for batch in seen)
    assert sorted(row for batch in seen for row in batch) == sorted([record["id"] for record in records] * 2)
    half = len(seen) // 2
    assert sorted(row for batch in seen[:half] for row in batch) == sorted(record["id"] for record in records)
    assert seen[:half] != seen[half:]


@pytest.mark.parametrize("fields", [{}, {"tokens_per_batch": 300}], ids=["padded", "packed"])
def test_data_of_which_no_row_is_left_is_refused(workspace, tmp_path, fields):
    trainer = {} if fields else {"per_device_train_batch_size": 2}
    recipe = write_recipe(workspace, **fields, max_length=2, trainer=trainer, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"got no row in data \(12 too long, dropped\); expected at least one"):
        build_trainer(read_recipe(recipe))


def test_streaming_data_of_which_no_row_is_left_is_refused(workspace, tmp_path):
    data = [{"path": str(workspace / "rows.json"), "image_folder": str(workspace), "streaming": True}]
    with pytest.raises(ValueError, match=r"got no row in data \(12 too long, dropped\)"):
        build_trainer(read_recipe(write_recipe(workspace, max_length=2, data=data, output_dir=str(tmp_path))))


@pytest.mark.parametrize("is_streaming", [False, True])
def test_bad_rows_are_skipped_by_id_where_the_recipe_says_so(workspace, tmp_path, caplog, is_streaming):
    records = json.loads((workspace / "rows.json").read_text())[:3]
    question = {"from": "human", "value": "Color?"}
    records.append({"id": "silent", "conversations": [question, {"from": "gpt", "value": ""}]})
    records.append(records[0] | {"id": "blind", "image": "nowhere.png"})
    (tmp_path / "rows.json").write_text(json.dumps(records))
    data = [{"path": str(tmp_path / "rows.json"), "image_folder": str(workspace), "streaming": is_streaming}]
    # One epoch and a little: the Trainer reads no further.
    trainer = {"per_device_train_batch_size": 1, "max_steps": 3, "disable_tqdm": True, "gradient_checkpointing": False}
    fields = {"data": data, "trainer": trainer, "output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="in record 'silent'"):
        list(build_trainer(read_recipe(write_recipe(workspace, **fields))).train_dataset)
    caplog.clear()
    train(read_recipe(write_recipe(workspace, **fields, bad_rows="skip")))
    skipped = [message for message in caplog.messages if message.startswith("skipped: ")]
    assert any("in record 'silent'" in message for message in skipped)
    assert any("in record 'blind'" in message and "nowhere.png" in message for message in skipped)
    counts = [message for message in caplog.messages if "cannot be used, skipped" in message]
    assert counts == [
        "2 streaming rows read: cannot be used, skipped" if is_streaming else "2 rows of data: cannot be used, skipped"
    ]


@pytest.mark.parametrize(
    ("fields", "times"),
    [
        ({"max_length": 500, "tokens_per_batch": 600}, 1),
        ({"tokens_per_batch": 600}, 1),
        ({"max_length": 500}, 1),
        ({}, 0),
    ],
    ids=str,
)
def test_rows_are_measured_once(workspace, tmp_path, monkeypatch, fields, times):
    measured = []

    def measure(row, *args):
        measured.append(row["id"])
        return measure_row(row, *args)

    monkeypatch.setattr(row_lengths, "measure_row", measure)
    trainer = {} if "tokens_per_batch" in fields else {"per_device_train_batch_size": 2}
    build_trainer(read_recipe(write_recipe(workspace, **fields, trainer=trainer, output_dir=str(tmp_path))))
    assert sorted(measured) == sorted(["0", "1", "2"] * 4 * times)


# from Python 3.12 on, forking a process with threads warns
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("packed", [True, False])
def test_picture_that_vanished_is_named_with_its_row(workspace, tmp_path, monkeypatch, capsys, packed, num_workers):
    pictures = shutil.copytree(workspace, tmp_path / "pictures", ignore=shutil.ignore_patterns("out*", "start"))
    start_training = LlavaTrainer.train

    def vanish_and_train(self, **kwargs):
        (pictures / "blue.png").unlink()
        return start_training(self, **kwargs)

    monkeypatch.setattr(LlavaTrainer, "train", vanish_and_train)
    trainer = {"max_steps": 20, "save_strategy": "steps", "save_steps": 1, "dataloader_num_workers": num_workers}
    fields = {"tokens_per_batch": 300, "max_length": 250} if packed else {}
    trainer |= {"disable_tqdm": True} | ({} if packed else {"per_device_train_batch_size": 1})
    fields |= {"data": [{"path": str(pictures / "rows.json"), "image_folder": str(pictures)}], "trainer": trainer}
    recipe = write_recipe(workspace, **fields, output_dir=str(tmp_path / "out"))
    assert main(["train", str(recipe)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("llava: got an image that cannot be opened")
    assert "in record '1'" in error and str(pictures / "blue.png") in error


def test_picture_that_is_missing_for_the_cache_is_named_with_its_row(workspace, tmp_path):
    fields = {"data": [{"path": str(workspace / "rows.json"), "image_folder": str(tmp_path)}]}
    recipe = write_recipe(workspace, **fields, feature_cache=str(tmp_path / "cache"), output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"red\.png.* in record '0'"):
        build_trainer(read_recipe(recipe))
