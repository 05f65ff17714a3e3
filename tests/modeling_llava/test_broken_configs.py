"""Whatever stands in config.json or a processor's files: the model answers, or one line says what to correct."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from modeling_llava import AnyLlavaConfig, AutoModelForVision2Seq
from modeling_llava.inference.loading import load_for_inference
from processing_llava import AnyLlavaProcessor
from tests.modeling_llava.checkpoints import folder_changes
from tests.tiny import TILE_SIZE

LAYOUTS = ("any_llava", "llava", "original")
WRONG = (None, "a", -1, 0, [], {})
ELSEWHERE = {
    "image_token_index": "image_token_id",
    "torch_dtype": "dtype",
    "mm_vision_tower": "vision tower",
    "mm_projector_type": "projector_type",
    "mm_patch_merge_type": "patch_merge_type",
    "mm_vision_select_feature": "vision_feature_select_strategy",
}
"""What messages call a field."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder for each layout, in which `model` is the checkpoint."""
    root = tmp_path_factory.mktemp("broken_configs")
    for layout in LAYOUTS:
        folder_changes.LAYOUTS[layout](root / layout)
    return root


@pytest.fixture
def copied(prepared, tmp_path):
    """Copies one of them, to be changed."""

    def copy_layout(layout: str) -> Path:
        shutil.copytree(prepared / layout, tmp_path / layout)
        return tmp_path / layout / "model"

    return copy_layout


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


def list_broken(folder: Path) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Writes a config.json with each value in each place, one after the other."""
    fields = json.loads((folder / "config.json").read_text())
    places = [(name,) for name in fields]
    places += [(name, inner) for name, value in fields.items() if isinstance(value, dict) for inner in value]
    for place in places:
        for value in WRONG:
            (folder / "config.json").write_text(json.dumps(change(fields, place, value)))
            yield place, value


def find_fault(door: Callable[[Path], Any], folder: Path, place: tuple[str, ...], *, names: bool) -> str | None:
    """What is wrong with how a door takes a config.json with a value in a place."""
    try:
        door(folder)
    except (ValueError, OSError) as error:
        known = {place[-1], ELSEWHERE.get(place[-1], place[-1])}
        # A tower of another depth lacks weights, which are named.
        is_named = "weights" in str(error) or any(name in str(error) for name in known)
        return str(error) if "\n" in str(error) or (names and not is_named) else None
    except Exception as error:
        return repr(error)
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_field_of_a_config_is_read_or_named(layout, copied):
    """By the configuration alone; and of the values of each field, another one each time is answered with."""
    folder, faults = copied(layout), []
    for number, (place, value) in enumerate(list_broken(folder)):
        if place != ("model_type",):  # transformers says itself that it knows no such model
            faults.append((place, value, find_fault(AutoConfig.from_pretrained, folder, place, names=False)))
        if layout != "llava" and number % len(WRONG) == number // len(WRONG) % len(WRONG):
            faults.append((place, value, find_fault(answer, folder, place, names=True)))
    assert [fault for fault in faults if fault[-1] is not None] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_field_of_a_config_is_right_or_named(layout, copied):
    folder, faults = copied(layout), []
    for place, value in list_broken(folder):
        faults.append((place, value, find_fault(answer, folder, place, names=True)))
        if layout == "llava" and place != ("model_type",):  # whose own class it is that loads
            door = AutoModelForVision2Seq.from_pretrained
            faults.append((place, value, find_fault(door, folder, place, names=False)))
    assert [fault for fault in faults if fault[-1] is not None] == []


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
def test_values_of_the_right_type_are_named_too(part, field, value, copied):
    folder = copied("any_llava")
    fields = json.loads((folder / "config.json").read_text())
    place = (field,) if part is None else (part, field)
    (folder / "config.json").write_text(json.dumps(change(fields, place, value)))
    with pytest.raises(ValueError, match=f"^got [^\n]*{field}[^\n]*$"):
        load_for_inference(str(folder))


@pytest.mark.parametrize("layout", ["any_llava", "llava"])
def test_equal_sides_are_one(layout, copied):
    folder = copied(layout)
    fields = json.loads((folder / "config.json").read_text())
    sides = change(fields, ("vision_config", "image_size"), [TILE_SIZE, TILE_SIZE])
    (folder / "config.json").write_text(json.dumps(sides))
    answer(folder)


def test_a_config_without_a_part_is_no_model():
    for fields in ({}, {"text_config": None}, {"text_config": {}, "vision_config": {}}):
        with pytest.raises(ValueError, match="text_config"):
            AnyLlavaConfig.from_dict(fields)


@pytest.mark.parametrize("value", ["a", ["../tower"], 3, None])
def test_a_tower_is_named_by_a_text(value, copied):
    folder = copied("original")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"mm_vision_tower": value}))
    with pytest.raises(ValueError, match="tower"):
        load_for_inference(str(folder))


@pytest.mark.parametrize("content", ["[]", "{", "null", '"x"', "\xff"])
@pytest.mark.parametrize("layout", ["any_llava", "original"])
def test_broken_files_are_named(layout, content, copied):
    folder = copied(layout)
    names = {"config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json", "added_tokens.json"}
    for name in sorted(names & {path.name for path in folder.iterdir()}):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(content.encode("latin1"))
        for door in (AnyLlavaProcessor.from_pretrained, AutoProcessor.from_pretrained, load_for_inference):
            with pytest.raises(ValueError, match=f"^got [^\n]*{name}[^\n]*$"):
                door(str(folder))
        (folder / name).write_bytes(whole)


def test_the_image_processor_of_a_tower_is_named(copied):
    folder = copied("original")
    (folder.parent / "tower" / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        AnyLlavaProcessor.from_pretrained(str(folder))
