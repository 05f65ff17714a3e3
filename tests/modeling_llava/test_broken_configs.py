"""Whatever stands in config.json or a processor's files: the model answers, or one line says what to correct."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from modeling_llava import AnyLlavaConfig, AutoModelForVision2Seq
from modeling_llava.inference.loading import load_for_inference
from processing_llava import AnyLlavaProcessor
from tests.original_folders import write_v15
from tests.tiny import TILE_SIZE, save_tiny_checkpoint, tiny_model, tiny_processor

WRONG = (None, "a", -1, 0, [], {})
ELSEWHERE = {"image_token_index": "image_token_id", "torch_dtype": "dtype"}
"""What messages call a field."""


def save_ours(folder: Path) -> Path:
    return save_tiny_checkpoint(folder / "model")


def save_theirs(folder: Path) -> Path:
    processor = tiny_processor()
    tiny_model(image_token_id=processor.image_token_id).save_pretrained(folder / "model", layout="transformers")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def save_original(folder: Path) -> Path:
    write_v15(folder)
    return folder / "checkpoint"


LAYOUTS = {"any_llava": save_ours, "transformers": save_theirs, "original": save_original}


def answer(folder: Path) -> None:
    model, processor = load_for_inference(str(folder))
    content = [{"type": "image", "image": Image.new("RGB", (40, 30), "red")}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    model.generate(**inputs, max_new_tokens=1, do_sample=False)


def change(fields: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    fields = copy.deepcopy(fields)
    inner = fields
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    return fields


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["any_llava", pytest.param("transformers", marks=pytest.mark.slow)])
def test_every_field_of_a_config_is_right_or_named(layout, tmp_path):
    folder = LAYOUTS[layout](tmp_path)
    fields = json.loads((folder / "config.json").read_text())
    places = [(name,) for name in fields]
    places += [(name, inner) for name, value in fields.items() if isinstance(value, dict) for inner in value]
    doors = [answer, AutoConfig.from_pretrained]
    if layout == "transformers":  # whose own class it is that loads
        doors.append(AutoModelForVision2Seq.from_pretrained)
    faults = []
    for place in places:
        for value in WRONG:
            (folder / "config.json").write_text(json.dumps(change(fields, place, value)))
            for door in doors:
                if place == ("model_type",) and door is not answer:
                    continue  # transformers says itself that it knows no such model
                try:
                    door(folder)
                except (ValueError, OSError) as error:
                    names = {place[-1], ELSEWHERE.get(place[-1], place[-1])}
                    # A tower of another depth lacks weights, which are named.
                    is_named = "weights" in str(error) or any(name in str(error) for name in names)
                    if "\n" in str(error) or (door is answer and not is_named):
                        faults.append((place, value, str(error)))
                except Exception as error:
                    faults.append((place, value, repr(error)))
    assert faults == []


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("text_config", "hidden_act", "foo"),
        ("text_config", "rope_parameters", {"rope_type": "foo"}),
        ("text_config", "num_attention_heads", 5),
        ("text_config", "num_key_value_heads", 3),
        ("vision_config", "num_attention_heads", 5),
        ("vision_config", "patch_size", 2 * TILE_SIZE),
        ("vision_config", "image_size", [28, 56]),
        (None, "dtype", "float99"),
        (None, "vision_feature_layer", [-1, "a"]),
        (None, "image_grid_pinpoints", [[1, 2]]),
        (None, "tie_word_embeddings", "yes"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_values_of_the_right_type_are_named_too(part, field, value, tmp_path):
    folder = save_ours(tmp_path)
    fields = json.loads((folder / "config.json").read_text())
    place = (field,) if part is None else (part, field)
    (folder / "config.json").write_text(json.dumps(change(fields, place, value)))
    with pytest.raises(ValueError, match=f"^got [^\n]*{field}[^\n]*$"):
        load_for_inference(str(folder))


@pytest.mark.parametrize("layout", ["any_llava", "transformers"])
def test_equal_sides_are_one(layout, tmp_path):
    folder = LAYOUTS[layout](tmp_path)
    fields = json.loads((folder / "config.json").read_text())
    sides = change(fields, ("vision_config", "image_size"), [TILE_SIZE, TILE_SIZE])
    (folder / "config.json").write_text(json.dumps(sides))
    answer(folder)


def test_a_config_without_a_part_is_no_model():
    for fields in ({}, {"text_config": None}, {"text_config": {}, "vision_config": {}}):
        with pytest.raises(ValueError, match="text_config"):
            AnyLlavaConfig.from_dict(fields)


@pytest.mark.parametrize("value", ["a", ["../tower"], 3, None])
def test_a_tower_is_named_by_a_text(value, tmp_path):
    folder = save_original(tmp_path)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"mm_vision_tower": value}))
    with pytest.raises(ValueError, match="tower"):
        load_for_inference(str(folder))


@pytest.mark.parametrize("content", ["[]", "{", "null", '"x"', "\xff"])
@pytest.mark.parametrize("layout", ["any_llava", "original"])
def test_broken_files_are_named(layout, content, tmp_path):
    folder = LAYOUTS[layout](tmp_path)
    names = {"config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json", "added_tokens.json"}
    for name in sorted(names & {path.name for path in folder.iterdir()}):
        broken = tmp_path / "broken"
        shutil.copytree(folder, broken)
        (broken / name).write_bytes(content.encode("latin1"))
        for door in (AnyLlavaProcessor.from_pretrained, AutoProcessor.from_pretrained, load_for_inference):
            with pytest.raises(ValueError, match=f"^got [^\n]*{name}[^\n]*$"):
                door(str(broken))
        shutil.rmtree(broken)


def test_the_image_processor_of_a_tower_is_named(tmp_path):
    folder = save_original(tmp_path)
    (tmp_path / "tower" / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        AnyLlavaProcessor.from_pretrained(str(folder))
