"""`llava merge`: base and adapter side by side compute what the merged model computes."""

import json
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoProcessor, LlamaConfig

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration, AutoModelForVision2Seq
from modeling_llava.acceleration.quantization import four_bit_config
from modeling_llava.cli import main
from modeling_llava.export.merged_adapter import compare, merge_adapter
from tests import original_folders as folders
from tests.modeling_llava.checkpoints.test_original_adapters import with_added, write_lora
from tests.modeling_llava.export.conftest import train_tiny
from tests.tiny import VISION_CONFIGS, VOCAB_SIZE, save_tiny_checkpoint, tiny_processor


def logits_of(model, folder) -> torch.Tensor:
    content = [{"type": "text", "text": "Color?"}]
    inputs = AutoProcessor.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return folders.logits_of(model.eval(), inputs)


def save_wide_checkpoint(folder):
    """bitsandbytes answers on a CPU only if widths are multiples of 64."""
    processor = tiny_processor()
    text_config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    config = AnyLlavaConfig(VISION_CONFIGS["clip"](), text_config, image_token_id=processor.image_token_id)
    model = AnyLlavaForConditionalGeneration(config)
    folders.widen(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_16_bit_base(adapter, workspace, tmp_path, capsys):
    assert main(["merge", str(adapter), "--out", str(tmp_path / "merged")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"16-bit base; logits before and after differ by at most \d\S* \(largest logit", printed)
    base = AutoModelForVision2Seq.from_pretrained(workspace / "start")
    expected = logits_of(PeftModel.from_pretrained(base, adapter), adapter)
    merged = AutoModelForVision2Seq.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged, tmp_path / "merged"), expected, rtol=1e-5, atol=1e-5)
    start = AutoModelForVision2Seq.from_pretrained(workspace / "start")
    assert not torch.allclose(logits_of(start, adapter), expected, rtol=1e-3, atol=1e-3)
    record = json.loads((tmp_path / "merged" / "training_record.json").read_text())
    assert record["recipe"]["stage"] == "lora"
    assert record["merged"]["base_bits"] == 16


def test_a_base_in_the_layout_of_transformers(adapter, workspace, tmp_path):
    """Their class has another name for the projector; the trained one has to arrive all the same."""
    start = AnyLlavaForConditionalGeneration.from_pretrained(workspace / "start")
    start.save_pretrained(tmp_path / "base", layout="transformers")
    merge_adapter(str(adapter), tmp_path / "expected")
    merge_adapter(str(adapter), tmp_path / "merged", base_model=str(tmp_path / "base"))
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "expected"))
    trained = [name for name in expected if "mm_projector" in name]
    assert trained
    for name in trained:
        assert torch.equal(found[name], expected[name])


def test_a_4_bit_base_is_the_one_that_was_trained_on(workspace, tmp_path, capsys):
    """The record says qlora, so the adapter goes onto the weights as they were rounded."""
    pytest.importorskip("bitsandbytes")
    start = save_wide_checkpoint(tmp_path / "start")
    adapter = train_tiny(
        workspace, "qlora", model=str(start), lora={"r": 4, "lora_alpha": 8}, output_dir=str(tmp_path / "adapter")
    )
    assert main(["merge", str(adapter), "--out", str(tmp_path / "merged")]) == 0
    assert "4-bit base; logits before and after differ" in capsys.readouterr().out
    base = AutoModelForVision2Seq.from_pretrained(start, quantization_config=four_bit_config())
    expected = logits_of(PeftModel.from_pretrained(base, adapter), adapter)
    merged = AutoModelForVision2Seq.from_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    error = (logits_of(merged.float(), adapter) - expected.float()).abs().max() / expected.abs().max()
    onto_16_bits = merge_adapter(str(adapter), tmp_path / "other", base_bits=16)
    assert onto_16_bits.base_bits == 16
    other = AutoModelForVision2Seq.from_pretrained(tmp_path / "other")
    other_error = (logits_of(other.float(), adapter) - expected.float()).abs().max() / expected.abs().max()
    # 16 bits alone make two parts in a hundred of these wide random weights.
    assert error < 0.1
    assert error < other_error / 3


def test_a_lora_of_the_original(run, tmp_path, capsys):
    folder, model = run
    expected = with_added(model, write_lora(folder / "result", model))
    assert main(["merge", str(folder / "result"), "--out", str(folder / "merged")]) == 0
    assert "16-bit base; logits before and after differ" in capsys.readouterr().out
    merged = AutoModelForVision2Seq.from_pretrained(folder / "merged")
    inputs = folders.example_inputs(model)
    torch.testing.assert_close(
        folders.logits_of(merged, inputs), folders.logits_of(expected, inputs), rtol=1e-3, atol=1e-3
    )


def test_a_base_of_another_size(adapter, tmp_path, capsys):
    save_tiny_checkpoint(tmp_path / "base", text="qwen3")
    arguments = ["merge", str(adapter), "--out", str(tmp_path / "merged"), "--base-model", str(tmp_path / "base")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "this weight belongs to another model" in error and "adapter_model.safetensors; expected [" in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--base-bits", "8"], "got 8 bits; expected 4 or 16"),
        (["--base-model", "someone/nothing"], "and base 'someone/nothing', looked for from"),
    ],
)
def test_wrong_arguments(adapter, tmp_path, capsys, arguments, message):
    assert main(["merge", str(adapter), "--out", str(tmp_path / "merged"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_computes_something_else_is_refused():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="computes something else: 16-bit base; logits before and after differ"):
        compare(logits, -logits, base_bits=16)
