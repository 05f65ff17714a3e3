"""A model and a processor that do not fit are refused wherever they meet; a folder gives two that fit."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.checkpoints.layouts import write_transformers_config
from modeling_llava.checkpoints.shared_values import check_processor
from modeling_llava.export.model_repository import build_transformers_processor, save_transformers_processor
from modeling_llava.inference.batched_generation import generate_answers
from modeling_llava.inference.chat_session import ChatSession
from modeling_llava.inference.loading import load_for_inference
from processing_llava import AnyLlavaProcessor
from tests.tiny import PINPOINTS, save_tiny_checkpoint, tiny_model, tiny_processor

TILED = {"patch_merge_type": "spatial_unpad"}
MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": Image.effect_noise((50, 30), 90).convert("RGB")},
            {"type": "text", "text": "What?"},
        ],
    }
]


def pair(*, is_tiled: bool = False, **settings):
    """A model and its processor."""
    images = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS} if is_tiled else {}
    settings |= TILED if is_tiled else {}
    processor = tiny_processor(**images, **{key: settings[key] for key in settings if key == "patch_merge_type"})
    pinpoints = {"image_grid_pinpoints": PINPOINTS} if is_tiled else {}
    return tiny_model(image_token_id=processor.image_token_id, **pinpoints, **settings), processor


def encode(processor):
    return processor.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.parametrize("is_tiled", [False, True])
@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
@pytest.mark.parametrize("settings", [{}, {"vision_feature_select_strategy": "cls_patch"}])
def test_our_processor_of_transformers_folder(tmp_path, is_tiled, aspect_ratio, settings):
    if is_tiled and (settings or aspect_ratio == "square"):
        pytest.skip("no such layout")
    model, processor = pair(is_tiled=is_tiled, **settings)
    if not is_tiled:
        processor.image_processor.image_aspect_ratio = aspect_ratio
        processor.num_prefix_tokens = model.config.num_prefix_tokens
    model.save_pretrained(tmp_path, layout="transformers")
    theirs = build_transformers_processor(processor, write_transformers_config(model.config))
    save_transformers_processor(theirs, tmp_path)
    found = AnyLlavaProcessor.from_pretrained(tmp_path)
    loaded = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    check_processor(loaded.config, found)
    inputs, expected = encode(found), encode(processor)
    assert inputs.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(inputs[name], value), name
    with torch.no_grad():
        logits = loaded(**inputs).logits
        built_in = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()(**encode(theirs)).logits
    torch.testing.assert_close(logits, built_in, rtol=1e-4, atol=1e-4)


def test_the_processor_of_transformers_contradicts_its_model(tmp_path):
    model, processor = pair(is_tiled=True)
    model.save_pretrained(tmp_path, layout="transformers")
    theirs = build_transformers_processor(processor, write_transformers_config(model.config))
    save_transformers_processor(theirs, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"image_token_index": 7}))
    with pytest.raises(ValueError, match="image_token_index=7 in config.json, and a tokenizer that gives '<image>'"):
        AnyLlavaProcessor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw | {"image_grid_pinpoints": PINPOINTS[:2]}))
    with pytest.raises(ValueError, match="image_grid_pinpoints .* in config.json and .* in its image processor"):
        AnyLlavaProcessor.from_pretrained(tmp_path)


def test_our_processor_beside_transformers_layout_stays(tmp_path):
    model, processor = pair()
    model.save_pretrained(tmp_path, layout="transformers")
    processor.role_markers = "refuse"
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).role_markers == "refuse"
    assert AnyLlavaProcessor.from_pretrained(tmp_path).role_markers == "refuse"


CHANGES = {
    "patch_size": 14,
    "num_prefix_tokens": 1,
    "visual_tokens": 3,
    "image_token_id": 5,
    "patch_merge_type": "flat",
    "image_grid_pinpoints": PINPOINTS[::-1],
    "image size": 14,
}


def change(processor, name: str) -> None:
    if name == "image size":
        images = tiny_processor().image_processor.to_dict() | {"size": {"shortest_edge": 14}}
        images |= {"crop_size": {"height": 14, "width": 14}}
        processor.image_processor = type(processor.image_processor).from_dict(images)
    elif name == "image_grid_pinpoints":
        processor.image_processor.image_grid_pinpoints = CHANGES[name]
    else:
        setattr(processor, name, CHANGES[name])


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("door", ["check", "chat", "batch"])
def test_values_that_differ(name, door):
    model, processor = pair(is_tiled=True)
    check_processor(model.config, processor)
    change(processor, name)
    with pytest.raises(ValueError, match=f"got a processor with .*{name}=.* for a model with .*{name}="):
        if door == "check":
            check_processor(model.config, processor)
        elif door == "chat":
            ChatSession(model, processor)
        else:
            list(generate_answers(model, processor, []))


def test_a_tiled_model_may_see_whole_pictures():
    """As its recipe or its user chooses; the pinpoints stay."""
    model, processor = pair(is_tiled=True)
    processor.image_processor.image_aspect_ratio = "pad"
    check_processor(model.config, processor)


def test_a_folder_with_two_that_do_not_fit(tmp_path):
    folder = save_tiny_checkpoint(tmp_path)
    tiny_processor(visual_tokens=4).save_pretrained(folder)
    with pytest.raises(ValueError, match="visual_tokens=4 for a model with visual_tokens=None"):
        load_for_inference(str(folder))


@pytest.mark.parametrize("name", ["videos", "audio"])
def test_what_the_processor_cannot_encode(name):
    with pytest.raises(ValueError, match=f"got {name}; expected pictures"):
        tiny_processor()(text="<video>What?", **{name: [[Image.new("RGB", (8, 8))]]})
