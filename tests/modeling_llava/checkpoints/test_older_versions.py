"""Checkpoints that transformers 4 wrote compute what transformers 4 computed (`tests/transformers_4`)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from modeling_llava import AnyLlavaForConditionalGeneration, AutoModelForVision2Seq
from tests.transformers_4 import make_logits

CASES = json.loads((make_logits.HERE / "cases.json").read_text())
LOGITS = load_file(make_logits.HERE / "logits.safetensors")


def write_folder(folder: Path, case: str) -> dict:
    """The checkpoint as that version wrote it; returns the inputs of its logits."""
    config, shapes = CASES[case]["config"], CASES[case]["shapes"]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(make_logits.draw_weights(shapes), folder / "model.safetensors", metadata={"format": "pt"})
    num_image_tokens = make_logits.count_image_tokens(config)
    return make_logits.draw_inputs(is_tiled=config["model_type"] == "llava_next", num_image_tokens=num_image_tokens)


def compute(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


DOORS = {
    "AnyLlavaForConditionalGeneration": AnyLlavaForConditionalGeneration.from_pretrained,
    "AutoModelForVision2Seq": AutoModelForVision2Seq.from_pretrained,
    "with the configuration of today": lambda folder: AnyLlavaForConditionalGeneration.from_pretrained(
        folder, config=AutoConfig.from_pretrained(folder)
    ),
    "both": lambda folder: AutoModelForVision2Seq.from_pretrained(folder, config=AutoConfig.from_pretrained(folder)),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_version_that_wrote_it(tmp_path, case, door):
    inputs = write_folder(tmp_path, case)
    torch.testing.assert_close(compute(DOORS[door](tmp_path), inputs), LOGITS[case], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", ["v4.56.1", "4", "v4", "4.56", "4.56.1.dev0"])
def test_spellings_of_the_version(tmp_path, version):
    inputs = write_folder(tmp_path, "gemma-siglip")
    config = CASES["gemma-siglip"]["config"] | {"transformers_version": version}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForVision2Seq.from_pretrained(tmp_path)
    torch.testing.assert_close(compute(model, inputs), LOGITS["gemma-siglip"], rtol=1e-4, atol=1e-4)


def test_a_change_of_the_configuration_of_today_counts(tmp_path):
    """What the caller changes is computed; what the file says otherwise means what it meant."""
    inputs = write_folder(tmp_path, "gemma")
    config = AutoConfig.from_pretrained(tmp_path)
    config.text_config.rms_norm_eps, config.vision_feature_layer = 0.5, -1
    model = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path, config=config)
    assert model.config.text_config.rms_norm_eps == 0.5 and model.config.vision_feature_layer == -1
    assert model.config.scale_image_features
    assert (compute(model, inputs) - LOGITS["gemma"]).abs().max() > 0.01


def test_gemma_activation_of_the_versions_that_ignored_hidden_act(tmp_path):
    """4.39 to 4.47, by the numbers of a version that computed what it said."""
    inputs = write_folder(tmp_path, "gemma")
    text_config = CASES["gemma"]["config"]["text_config"] | {"hidden_act": "relu", "hidden_activation": None}
    config = CASES["gemma"]["config"] | {"text_config": text_config, "transformers_version": "4.44.2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(compute(model, inputs), LOGITS["gemma"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["gemma", "gemma-siglip", "llama-tied-outside", "next-gemma", "next-qwen2"])
@pytest.mark.parametrize("layout", ["any_llava", "transformers"])
def test_what_is_saved_again_keeps_its_meaning(tmp_path, case, layout):
    """Written by the present version, or refused where its own class computes something else."""
    inputs = write_folder(tmp_path, case)
    model = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path)
    if layout == "transformers" and "gemma" in case:
        with pytest.raises(ValueError, match="got scale_image_features=True"):
            model.save_pretrained(tmp_path / "saved", layout=layout)
        return
    model.save_pretrained(tmp_path / "saved", layout=layout)
    again = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(compute(again, inputs), LOGITS[case], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "case, field",
    [
        ("gemma", "the factor of image features"),
        ("gemma-siglip", "text_config.hidden_act"),
        ("llama-tied-outside", "tie_word_embeddings"),
        ("next-qwen2", "tie_word_embeddings"),
        ("qwen2-own-head", "tie_word_embeddings"),
        ("qwen2", None),
        ("llama", None),
    ],
)
def test_it_is_told_which_class_is_loaded(tmp_path, case, field, caplog):
    write_folder(tmp_path, case)
    model = AutoModelForVision2Seq.from_pretrained(tmp_path)
    assert (type(model) is AnyLlavaForConditionalGeneration) == (field is not None)
    told = [record.getMessage() for record in caplog.records if "was written by transformers" in record.getMessage()]
    assert len(told) == (field is not None)
    assert all("transformers 4.56.1" in message and field in message for message in told)
    assert all("AnyLlavaForConditionalGeneration is loaded" in message for message in told)


def test_what_only_transformers_class_can_express_is_told(tmp_path, caplog):
    write_folder(tmp_path, "gemma")
    (tmp_path / "config.json").write_text(json.dumps(CASES["gemma"]["config"] | {"projector_hidden_act": "relu"}))
    assert type(AutoModelForVision2Seq.from_pretrained(tmp_path)).__name__ == "LlavaForConditionalGeneration"
    assert "for want of a class that computes what that version did (got projector_hidden_act='relu'" in caplog.text


def test_original_gemma_with_newlines(tmp_path):
    """There, too, newlines between rows of patches were multiplied with all other embeddings."""
    inputs = write_folder(tmp_path / "stored", "next-gemma")
    model = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path / "stored")
    newline = model.model.image_newline
    features = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
    torch.testing.assert_close(features[8], newline * newline.shape[-1] ** 0.5)
