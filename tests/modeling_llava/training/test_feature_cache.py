"""The feature cache: what it serves trains like the pictures themselves, and nothing stale is ever served."""

import json
import threading
from pathlib import Path

import PIL.Image
import pytest
import torch
from transformers import AutoProcessor

from modeling_llava import AutoModelForVision2Seq
from modeling_llava.training.feature_cache import FeatureCache
from modeling_llava.training.recipe import DataSource, Recipe
from modeling_llava.training.run import train
from processing_llava.data.collator import LlavaDataCollator
from tests.tiny import PINPOINTS, save_tiny_checkpoint, tiny_model

COLORS = ("red", "blue", "green")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    for color in COLORS:
        PIL.Image.new("RGB", (40, 30), color).save(folder / f"{color}.png")
    save_tiny_checkpoint(folder / "start")
    return folder


@pytest.fixture
def parts(workspace):
    model = AutoModelForVision2Seq.from_pretrained(workspace / "start", dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(workspace / "start")


def make_row(*images: Path) -> dict:
    question = [{"type": "image"} for _ in images] + [{"type": "text", "text": "Color?"}]
    answer = [{"type": "text", "text": "Red."}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": "0", "images": images, "messages": messages}


def test_loss_and_gradients_are_those_of_the_pictures(workspace, parts, tmp_path):
    model, processor = parts
    red, blue, green = (workspace / f"{color}.png" for color in COLORS)
    rows = [make_row(red), make_row(), make_row(blue, green), make_row(red)]
    cache = FeatureCache(model, processor, tmp_path)
    cache.add(rows)
    results = []
    for read_features in (None, cache.read):
        batch = LlavaDataCollator(processor, read_features=read_features)(rows)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, {name: value.grad for name, value in model.named_parameters() if "projector" in name}))
    assert "pixel_values" not in batch
    # Features are kept in 16 bits.
    torch.testing.assert_close(results[0], results[1], rtol=2e-3, atol=1e-5)


def test_a_run_with_a_cache_gives_the_model_of_a_run_without(workspace, tmp_path):
    records = [
        {
            "image": f"{color}.png",
            "conversations": [{"from": "human", "value": "<image>\nColor?"}, {"from": "gpt", "value": color}],
        }
        for color in COLORS
    ]
    (tmp_path / "rows.json").write_text(json.dumps(records * 2))
    trained = []
    for name, cache in (("without", None), ("with", str(tmp_path / "cache"))):
        recipe = Recipe(
            stage="finetune",
            model=str(workspace / "start"),
            data=[DataSource(path=str(tmp_path / "rows.json"), image_folder=str(workspace))],
            output_dir=str(tmp_path / name),
            feature_cache=cache,
            trainer={"learning_rate": 1e-3, "per_device_train_batch_size": 3, "max_steps": 2, "disable_tqdm": True},
        )
        trained.append(AutoModelForVision2Seq.from_pretrained(train(recipe)).state_dict())
    torch.testing.assert_close(*trained, rtol=0, atol=1e-3)


def test_a_picture_is_encoded_once_even_under_two_names_and_in_two_runs(workspace, parts, tmp_path):
    model, processor = parts
    copy = tmp_path / "copy.png"
    copy.write_bytes((workspace / "red.png").read_bytes())
    encoded = []
    for run in ([workspace / "red.png"], [copy, workspace / "red.png", workspace / "blue.png"]):
        cache = FeatureCache(model, processor, tmp_path / "cache")
        encode = cache._encode
        cache._encode = lambda images, encode=encode: encoded.extend(images) or encode(images)
        cache.add([make_row(*run)])
    assert encoded == [workspace / "red.png", workspace / "blue.png"]
    red, copied = cache.read([workspace / "red.png", copy])
    assert torch.equal(red, copied)


def test_a_changed_picture_is_encoded_again(workspace, parts, tmp_path):
    picture = tmp_path / "picture.png"
    features = []
    for color in ("red", "blue"):
        PIL.Image.new("RGB", (40, 30), color).save(picture)
        cache = FeatureCache(*parts, tmp_path / "cache")
        cache.add([make_row(picture)])
        features.append(cache.read([picture]))
    assert not torch.equal(*features)


def test_runs_with_one_folder_do_not_write_over_each_other(workspace, parts, tmp_path):
    """Both look at the folder before either writes into it."""
    first, second = FeatureCache(*parts, tmp_path), FeatureCache(*parts, tmp_path)
    encode, started, ended = first._encode, threading.Event(), threading.Event()

    def encode_slowly(images):
        started.set()
        assert not ended.wait(0.5)
        return encode(images)

    first._encode = encode_slowly
    thread = threading.Thread(target=first.add, args=[[make_row(workspace / "red.png")]])
    thread.start()
    started.wait()
    second.add([make_row(workspace / "blue.png")])
    ended.set()
    thread.join()
    assert sorted(second.positions.values()) == [0, 1]
    alone = FeatureCache(*parts, tmp_path / "alone")
    for cache, color in ((first, "red"), (second, "blue")):
        alone.add([make_row(workspace / f"{color}.png")])
        torch.testing.assert_close(cache.read([workspace / f"{color}.png"]), alone.read([workspace / f"{color}.png"]))


@pytest.mark.parametrize("change", ["tower", "layer", "processor", "bf16"])
def test_another_tower_or_preprocessing_has_a_folder_of_its_own(parts, tmp_path, change):
    model, processor = parts
    before = FeatureCache(model, processor, tmp_path).folder
    if change == "tower":
        next(model.model.vision_tower.parameters()).data += 1
    elif change == "layer":
        model.config.vision_feature_layer = 1
    elif change == "processor":
        processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert FeatureCache(model, processor, tmp_path, bf16=change == "bf16").folder != before


def test_blocks_of_an_interrupted_run_are_written_over(workspace, parts, tmp_path):
    model, processor = parts
    cache = FeatureCache(model, processor, tmp_path)
    cache.add([make_row(workspace / "red.png")])
    with (cache.folder / "features.f16").open("ab") as file:
        file.write(b"half a block")
    again = FeatureCache(model, processor, tmp_path)
    again.add([make_row(*(workspace / f"{color}.png" for color in COLORS))])
    alone = FeatureCache(model, processor, tmp_path / "other")
    alone.add([make_row(workspace / "blue.png")])
    # Beside another picture it is encoded in other sums; what is kept has 16 bits.
    found, expected = (cache.read([workspace / "blue.png"]).half() for cache in (again, alone))
    torch.testing.assert_close(found, expected)


def test_pictures_that_cannot_be_decoded_are_skipped_or_name_their_row(workspace, parts, tmp_path):
    noise = PIL.Image.effect_noise((60, 60), 50)
    noise.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:1000])
    good = [make_row(workspace / f"{color}.png") for color in COLORS]
    bad = make_row(tmp_path / "cut.png") | {"id": "bad"}
    cache = FeatureCache(*parts, tmp_path / "cache")
    with pytest.raises(ValueError, match="cannot be decoded .* in record 'bad'"):
        cache.add([bad, *good])
    collator = LlavaDataCollator(parts[1], read_features=cache.read, on_bad_row="skip")
    for rows in ([good[0], bad, good[1]], [bad, good[2]]):
        cache.add(rows, on_bad_row="skip")
        assert len(collator(rows)["input_ids"]) == len(rows) - 1
    assert collator.skipped == ["bad", "bad"]
    alone = FeatureCache(*parts, tmp_path / "alone")
    alone.add(good)
    images = [row["images"][0] for row in good]
    torch.testing.assert_close(cache.read(images), alone.read(images), rtol=2e-3, atol=1e-3)


def test_tiled_pictures_and_a_tower_that_trains_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one tile for each picture"):
        FeatureCache(tiny_model(image_grid_pinpoints=PINPOINTS, patch_merge_type="spatial"), None, tmp_path)
    with pytest.raises(ValueError, match="for a tower that trains"):
        Recipe(
            stage="align",
            model="m",
            data=[DataSource(path="d")],
            output_dir="o",
            train_vision_tower=True,
            feature_cache=str(tmp_path),
        )
