"""Saving writes the layout that was loaded, or the one that is asked for, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

from modeling_llava import AnyLlavaForConditionalGeneration, AutoModelForVision2Seq
from tests import original_folders as folders
from tests.tiny import PINPOINTS, tiny_model


def read_weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def without_buffers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in weights.items() if "inv_freq" not in key}


def test_original_with_a_named_tower(tmp_path):
    folders.write_v15(tmp_path)
    loaded = AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint")
    loaded.save_pretrained(tmp_path / "saved")
    saved = read_weights(tmp_path / "saved")
    assert_equal_weights(saved, without_buffers(read_weights(tmp_path / "checkpoint")))
    before = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    after = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert after == before  # the tower lies as it did, seen from there


@pytest.mark.parametrize("layout", ["any_llava", "original", "transformers"])
def test_a_trainer_reads_back_what_it_saved(tmp_path, layout):
    """With `load_state_dict(weights, False)`, where it resumes or loads the best model."""
    folders.write_v15(tmp_path)
    loaded = AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint")
    if layout != "original":
        loaded.save_pretrained(tmp_path / "other", layout=layout)
        loaded = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path / "other")
    loaded.save_pretrained(tmp_path / "saved")
    expected = {name: value.clone() for name, value in loaded.state_dict().items() if "vision_tower" not in name}
    for parameter in loaded.parameters():
        parameter.data.zero_()
    loaded.load_state_dict(read_weights(tmp_path / "saved"), False)
    found = loaded.state_dict()
    assert_equal_weights({name: found[name] for name in expected}, expected)
    assert tuple(loaded.load_state_dict(found)) == ([], [])


def test_original_with_its_own_tower(tmp_path):
    tower = folders.make_tower("clip")
    folders.save_tower(folders.make_tower("clip", seed=6), tmp_path / "tower")
    model = folders.make_model(tower)
    folders.write_config(tmp_path / "checkpoint", model, vision_tower="../tower", text="llama")
    folders.write_sentencepiece(tmp_path / "checkpoint")
    weights = folders.original_weights(model, tower)
    folders.write_safetensors(tmp_path / "checkpoint", weights)
    loaded = AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint")
    loaded.save_pretrained(tmp_path / "saved")
    assert_equal_weights(read_weights(tmp_path / "saved"), without_buffers(weights))


def test_original_with_a_tower_that_was_trained(tmp_path):
    folders.write_v15(tmp_path)
    loaded = AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint")
    with torch.no_grad():
        next(loaded.model.vision_tower.parameters()).add_(1)
    loaded.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["unfreeze_mm_vision_tower"] is True
    folders.write_sentencepiece(tmp_path / "saved")
    again = AutoModelForVision2Seq.from_pretrained(tmp_path / "saved")
    assert_equal_weights(dict(again.state_dict()), dict(loaded.state_dict()))


def check_published(donor, built_in_class, folder) -> AnyLlavaForConditionalGeneration:
    """What transformers' own class saves, in our class: loaded with equal logits."""
    built_in = built_in_class.from_pretrained(folder / "donor").eval()
    built_in.save_pretrained(folder / "published")
    ours = AnyLlavaForConditionalGeneration.from_pretrained(folder / "published")
    inputs = folders.example_inputs(donor)
    expected = folders.logits_of(built_in, inputs)
    torch.testing.assert_close(folders.logits_of(ours, inputs), expected, rtol=1e-5, atol=1e-5)
    return ours


def test_tiled_checkpoints_of_transformers_own_class(tmp_path):
    donor = tiny_model(patch_merge_type="spatial_unpad", image_grid_pinpoints=PINPOINTS)
    donor.save_pretrained(tmp_path / "donor", layout="transformers")
    check_published(donor, LlavaNextForConditionalGeneration, tmp_path)


@pytest.mark.parametrize("layout", ["any_llava", "transformers"])
def test_original_in_another_layout(tmp_path, layout):
    model = folders.write_v15(tmp_path)
    loaded = AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint")
    loaded.save_pretrained(tmp_path / "saved", layout=layout)
    again = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert again.checkpoint_layout == layout
    inputs = folders.example_inputs(model)
    expected = folders.logits_of(model, inputs)
    assert torch.equal(folders.logits_of(again, inputs)[..., : expected.shape[-1]], expected)
    again.save_pretrained(tmp_path / "twice")
    assert_equal_weights(read_weights(tmp_path / "twice"), read_weights(tmp_path / "saved"))


@pytest.mark.parametrize(
    "settings, built_in_class",
    [
        ({}, LlavaForConditionalGeneration),
        ({"vision_feature_layer": [1, 3]}, LlavaForConditionalGeneration),
        ({"vision_feature_select_strategy": "cls_patch"}, LlavaForConditionalGeneration),
        # transformers' class takes "default" for "without the first token", which SigLIP has none to spare of.
        ({"vision": "siglip", "vision_feature_layer": -1}, LlavaForConditionalGeneration),
        ({"text": "qwen3"}, LlavaForConditionalGeneration),
        ({"patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}, LlavaNextForConditionalGeneration),
    ],
)
def test_transformers_own_class_reads_its_layout(tmp_path, settings, built_in_class):
    model = tiny_model(**settings)
    model.save_pretrained(tmp_path, layout="transformers")
    built_in, info = built_in_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is built_in_class
    inputs = folders.example_inputs(model)
    expected = folders.logits_of(model, inputs)
    found = folders.logits_of(built_in.eval(), inputs)[..., : expected.shape[-1]]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # New tokens are never the likeliest.
    assert (folders.logits_of(built_in, inputs).argmax(-1) < expected.shape[-1]).all()


def test_names_are_those_of_published_checkpoints(tmp_path):
    """Engines refuse the names that transformers 5 holds in memory."""
    tiny_model().save_pretrained(tmp_path, layout="transformers")
    prefixes = {".".join(key.split(".")[:2]) for key in read_weights(tmp_path)}
    assert prefixes == {
        "language_model.lm_head",
        "language_model.model",
        "multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2",
        "vision_tower.vision_model",
    }


def test_a_config_of_transformers_is_translated(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, layout="transformers")
    config = LlavaConfig.from_pretrained(tmp_path)
    loaded = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path, config=config)
    assert loaded.config.vision_feature_layers == model.config.vision_feature_layers
    assert torch.equal(loaded.model.mm_projector[0].weight, model.model.mm_projector[0].weight)


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_of_transformers_own_classes(tmp_path, tied):
    """Loaded with equal logits, and saved as they were; under the Auto classes they stay transformers' own."""
    donor = tiny_model(text="qwen3" if tied else "llama")
    donor.save_pretrained(tmp_path / "donor", layout="transformers")
    check_published(donor, LlavaForConditionalGeneration, tmp_path)
    assert type(AutoModelForVision2Seq.from_pretrained(tmp_path / "published")) is LlavaForConditionalGeneration


@pytest.mark.parametrize(
    "settings, layout, field",
    [
        ({"projector_type": "linear"}, "transformers", "projector_type"),
        ({"vision": "dinov2"}, "transformers", "vision_config.model_type"),
        ({"patch_merge_type": "spatial", "image_grid_pinpoints": PINPOINTS}, "transformers", "patch_merge_type"),
        ({"scale_image_features": True}, "transformers", "scale_image_features"),
        ({"visual_tokens": 5}, "transformers", "visual_tokens"),
        ({"visual_tokens": 5}, "original", "visual_tokens"),
        ({"text": "phi"}, "transformers", "lm_head_bias"),
        ({"text": "phi"}, "original", "text_config.model_type"),
        ({"vision": "dinov2"}, "original", "vision_config.model_type"),
        ({"vision_feature_layer": [1, 3]}, "original", "vision_feature_layer"),
        ({}, "original", "vision_config.name_or_path"),
    ],
)
def test_what_a_layout_cannot_express(tmp_path, settings, layout, field):
    with pytest.raises(ValueError, match=rf"got {field}=.*layout '{layout}' cannot express"):
        tiny_model(**settings).save_pretrained(tmp_path, layout=layout)


def test_unknown_layout(tmp_path):
    with pytest.raises(ValueError, match="got layout='hf'; expected one of any_llava, original, transformers"):
        tiny_model().save_pretrained(tmp_path, layout="hf")


def test_ours_as_original(tmp_path):
    tower = folders.make_tower("clip")
    folders.save_tower(tower, tmp_path / "tower")
    model = folders.make_model(tower)
    model.config.vision_config.name_or_path = str(tmp_path / "tower")
    model.save_pretrained(tmp_path / "saved", layout="original")
    folders.write_sentencepiece(tmp_path / "saved")
    again = AutoModelForVision2Seq.from_pretrained(tmp_path / "saved")
    assert again.checkpoint_layout == "original"
    assert_equal_weights(dict(again.state_dict()), dict(model.state_dict()))


def test_sharded(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, layout="transformers", max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path)
    inputs = folders.example_inputs(model)
    expected = folders.logits_of(model, inputs)
    assert torch.equal(folders.logits_of(again, inputs)[..., : expected.shape[-1]], expected)
