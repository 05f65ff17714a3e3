"""Checkpoints that transformers 4 wrote compute what transformers 4 computed (`tests/transformers_4`)."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_version_that_wrote_it(tmp_path, case):
    inputs = write_folder(tmp_path, case)
    model = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(compute(model, inputs), LOGITS[case], rtol=1e-4, atol=1e-4)


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
        ("llama", None),
    ],
)
def test_transformers_own_class_says_that_it_computes_something_else(tmp_path, case, field, caplog):
    write_folder(tmp_path, case)
    # Where its class would lack the output layer, it is not loaded at all.
    is_refused = case == "next-qwen2"
    with pytest.raises(ValueError, match="lm_head.weight") if is_refused else contextlib.nullcontext():
        AutoModelForVision2Seq.from_pretrained(tmp_path)
    told = [record.getMessage() for record in caplog.records if "was written by transformers" in record.getMessage()]
    assert len(told) == (field is not None)
    assert all("transformers 4.56.1" in message and field in message for message in told)


def test_original_gemma_with_newlines(tmp_path):
    """There, too, newlines between rows of patches were multiplied with all other embeddings."""
    inputs = write_folder(tmp_path / "stored", "next-gemma")
    model = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path / "stored")
    newline = model.model.image_newline
    features = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
    torch.testing.assert_close(features[8], newline * newline.shape[-1] ** 0.5)
